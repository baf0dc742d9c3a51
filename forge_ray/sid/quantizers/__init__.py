"""Quantizers, one file each: vectors in, codes out. `KINDS` is the registry of `quantizer.kind`."""

from forge_ray.sid.quantizers.base import QuantizerConfig
from forge_ray.sid.quantizers.fsq import FsqConfig
from forge_ray.sid.quantizers.opq import OpqConfig
from forge_ray.sid.quantizers.prq_kmeans import PrqKmeansConfig
from forge_ray.sid.quantizers.psrq import PsrqConfig
from forge_ray.sid.quantizers.random_codes import RandomConfig
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.quantizers.rq_opq import RqOpqConfig
from forge_ray.sid.quantizers.rq_vae import RqVaeConfig
from forge_ray.sid.quantizers.shuffled import ShuffledConfig

KINDS: tuple[type[QuantizerConfig], ...] = (
    RqKmeansConfig,
    RqVaeConfig,
    FsqConfig,
    OpqConfig,
    RqOpqConfig,
    PsrqConfig,
    PrqKmeansConfig,
    RandomConfig,
    ShuffledConfig,
)
"""Every kind of `QuantizerConfig`; importing this package makes them known to `load_config`."""
