"""What to do with items that share a semantic ID; pure functions of a frozen code table."""

from forge_ray.sid.resolvers.base import Problem, Resolution, ResolverConfig, resolve
from forge_ray.sid.resolvers.bucket import BucketConfig
from forge_ray.sid.resolvers.extra_token import ExtraTokenConfig
from forge_ray.sid.resolvers.knn_cap import KnnCapConfig
from forge_ray.sid.resolvers.pop_rank import PopRankConfig
from forge_ray.sid.resolvers.random_cap import RandomCapConfig
from forge_ray.sid.resolvers.sinkhorn_last import SinkhornLastConfig
from forge_ray.sid.resolvers.zcr import ZcrConfig

KINDS: tuple[type[ResolverConfig], ...] = (
    BucketConfig,
    ExtraTokenConfig,
    PopRankConfig,
    KnnCapConfig,
    RandomCapConfig,
    ZcrConfig,
    SinkhornLastConfig,
)
"""Every kind of `ResolverConfig`; importing this package makes them known to `load_config`."""

__all__ = [
    "KINDS",
    "BucketConfig",
    "ExtraTokenConfig",
    "KnnCapConfig",
    "PopRankConfig",
    "Problem",
    "RandomCapConfig",
    "Resolution",
    "ResolverConfig",
    "SinkhornLastConfig",
    "ZcrConfig",
    "resolve",
]
