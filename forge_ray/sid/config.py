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
        for name, least in (
            ("local_items", 0),
            ("max_actors", 1),
            ("cpus_per_actor", 0),
            ("gpus_per_actor", 0),
            ("batch_rows", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"encode.{name} must be >= {least}, got {getattr(self, name)}. Raise it."
                )


@dataclass(kw_only=True)
class TrainConfig:
    """How the training of a quantizer with a network is spread; workers change rounding alone."""

    workers: int = 0
    """Workers of Ray Train; 0 trains in the calling process. They share every batch, so their
    number must divide the batch sizes."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    """GPUs of a worker; with none it stays on the CPU. In the calling process (0 workers) a GPU is
    used where there is one."""
    checkpoint_every: int = 200
    """Steps between saves of the whole state, from which a killed training continues."""
    max_failures: int = 3
    """How often lost workers are replaced before the training fails."""
    prefetch_batches: int = 4
    """Batches of a worker on their way from Ray Data."""
    read_tasks: int = 1
    """Tasks per worker that gather batches at a time."""
    read_cpus: float = 0.0
    """CPUs that Ray reserves per gathering task. 0 never waits for a free CPU on a small machine.
    """

    def __post_init__(self) -> None:
        """Check the counts."""
        for name, least in (
            ("workers", 0),
            ("cpus_per_worker", 0),
            ("gpus_per_worker", 0),
            ("checkpoint_every", 1),
            ("max_failures", 0),
            ("prefetch_batches", 1),
            ("read_tasks", 1),
            ("read_cpus", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"train.{name} must be >= {least}, got {getattr(self, name)}. Raise it."
                )


@dataclass(kw_only=True)
class SidConfig:
    """Everything that decides a SID table, and how to spread the work."""

    quantizer: QuantizerConfig = field(default_factory=RqKmeansConfig)
    resolver: ResolverConfig = field(default_factory=BucketConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    seed: int = 0
    """The only seed of fitting: initial weights, k-means starts, samples and batches."""
    train: TrainConfig = field(default_factory=TrainConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)

    def __post_init__(self) -> None:
        """Check the seed."""
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}. Use another seed.")
