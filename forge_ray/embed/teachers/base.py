"""What every teacher does: read train histories, give one vector per item and one per user.

A teacher is a frozen model of behaviour that a quantizer's losses may look at. Pure: arrays in,
arrays out. Knows neither datasets nor files, so it cannot see what is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from forge_ray.config import Component
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError

FloatArray: TypeAlias = npt.NDArray[np.float32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
TeacherReport: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Called with an epoch number and the figures of that epoch."""


def ignore_report(epoch: int, metrics: Mapping[str, float]) -> None:
    """Drop the figures; the default of `TeacherConfig.fit`."""


@dataclass(frozen=True, eq=False)
class TrainLog:
    """Train histories of some users, U rows; 12 bytes per interaction."""

    user_index: Int64Array
    """int64 [U], the dataset's own user numbers."""
    items: Ragged
    """U histories of item indices, oldest first."""
    num_items: int
    """Catalogue size N."""

    def __len__(self) -> int:
        return len(self.user_index)

    def item_counts(self) -> Int64Array:
        """Count the interactions of every item, int64 [N]."""
        return np.bincount(self.items.values, minlength=self.num_items).astype(np.int64)


@dataclass(frozen=True, eq=False)
class TeacherVectors:
    """What a teacher learned."""

    items: FloatArray
    """float32 [N, t]; zero rows for items without an interaction in the log."""
    users: FloatArray
    """float32 [U, t], in the order of the log."""
    metrics: Mapping[str, float]
    """Figures for the manifest."""


@dataclass(kw_only=True)
class TeacherConfig(Component):
    """What every teacher needs to know; `kind` picks one."""

    kind: str = "ppmi_svd"
    dim: int = 64
    """Width t of the vectors; 32 in LETTER."""
    max_users: int = 1_000_000
    """Most users read, a random sample beyond it; 12 bytes per interaction are held."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_at_least({"dim": self.dim, "max_users": self.max_users}, 1)

    def fit(self, log: TrainLog, *, report: TeacherReport = ignore_report) -> TeacherVectors:
        """Learn vectors of all items and of the log's users.

        Args:
            log: train histories; nothing held out may be among them.
            report: called during training.
        """
        raise NotImplementedError(f"{type(self).__name__} does not fit a teacher")


def require_at_least(values: Mapping[str, float], least: float) -> None:
    """Check fields of a teacher.

    Raises:
        ConfigError: a value is below `least`; names the field.
    """
    for name, value in values.items():
        if not value >= least:
            raise ConfigError(f"teacher.{name} must be >= {least}, got {value}. Raise it.")


def unseen_to_zero(items: FloatArray, counts: Int64Array) -> FloatArray:
    """Blank the vectors of items that the log never shows: they hold nothing but their start.

    Args:
        items: float32 [N, t].
        counts: interactions of each item [N].
    """
    return np.where((counts > 0)[:, None], items, np.float32(0))
