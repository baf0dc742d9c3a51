"""Settings of an evaluation that hold for every row of a table, models and baselines alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from forge_ray.config import to_mapping
from forge_ray.data.schema import SPLITS
from forge_ray.errors import ConfigError

DEFAULT_KS = (5, 10, 20, 100)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Which users are ranked for, and how the rankings are scored."""

    split: str = "validation"
    """`validation`, or `test` once a design is final."""
    ks: list[int] = field(default_factory=lambda: list(DEFAULT_KS))
    """Cut-offs."""
    users: int | None = None
    """Rank for this many users, a fixed random sample; by default all."""
    exclude_seen: bool = True
    """Whether items of the history are kept out of the lists; FORGE leaves them in."""
    tail_max_count: int = 5
    """Train interactions up to which an item belongs to the tail; items without any are cold."""
    bootstrap: int = 1000
    """Replicates of the confidence intervals; 0 for none."""
    users_per_part: int = 2048
    """Users read and scored at a time, the unit that is spread over the cluster."""
    num_workers: int = 1
    """Parts scored at a time: 1 works in this process, more in as many Ray tasks."""
    cpus_per_worker: float = 1.0
    """CPUs, and so threads, of one task."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.split not in SPLITS[1:]:
            raise ConfigError(
                f"split must be validation or test, got {self.split!r}. Name one of them."
            )
        if not self.ks or min(self.ks) < 1:
            raise ConfigError(f"ks must be cut-offs >= 1, got {self.ks}. Use e.g. [5, 10, 20].")
        if self.users is not None and self.users < 1:
            raise ConfigError(f"users must be >= 1, got {self.users}. Leave it out for all users.")
        for name in ("users_per_part", "num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}. Raise it.")
        for name in ("bootstrap", "tail_max_count", "cpus_per_worker"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}. Raise it.")

    def common(self) -> dict[str, Any]:
        """The fields that decide the figures of any ranker, as mapping; those of a subclass not."""
        kept = EvaluationConfig.__dataclass_fields__.keys() - _RUNNING
        mapping = {name: value for name, value in to_mapping(self).items() if name in kept}
        return {**mapping, "ks": sorted(set(self.ks))}


_RUNNING = {"users_per_part", "num_workers", "cpus_per_worker"}
