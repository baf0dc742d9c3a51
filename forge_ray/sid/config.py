"""The configuration of a SID table: everything that decides its codes, and how work is spread."""

from __future__ import annotations

from dataclasses import dataclass, field

from forge_ray.embed.vectors import VectorsConfig
from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import QuantizerConfig
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.resolvers import BucketConfig, ResolverConfig


@dataclass(kw_only=True)
class EncodeConfig:
    """How encoding is spread over the cluster; none of it changes a code."""

    local_items: int = 50_000
    """Catalogues up to this size are encoded in the calling process: actors take longer to start.
    """
    max_actors: int = 64
    """Most encoder actors; the cluster's free CPUs bound it as well."""
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    """GPUs of an actor; with none it stays on the CPU, whatever the node has."""
    batch_rows: int = 16_384
    """Vectors an actor reads and encodes at once."""

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("max_actors", "batch_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"encode.{name} must be >= 1, got {getattr(self, name)}.")


@dataclass(kw_only=True)
class SidConfig:
    """Everything that decides a SID table, and how to spread the work."""

    quantizer: QuantizerConfig = field(default_factory=RqKmeansConfig)
    resolver: ResolverConfig = field(default_factory=BucketConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    seed: int = 0
    """The only seed of fitting: initial weights, k-means starts, samples and batches."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)

    def __post_init__(self) -> None:
        """Check the seed."""
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}. Use another seed.")
