"""Which co-occurrence of train histories the transforms read; each choice with its own limits.

Knows the choices and their fields; the kernels are in `data/cooccurrence.py`. Whoever calls `count`
passes train histories only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import scipy.sparse as sp

from forge_ray.config import Component
from forge_ray.data.cooccurrence import swing_scores, window_counts
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError


@dataclass(kw_only=True)
class CountsConfig(Component):
    """How two items of one history come to be related; `kind` picks one."""

    kind: str = "window"

    def count(self, histories: Iterable[Ragged], num_items: int) -> sp.csr_array:
        """Relate items by train histories.

        Args:
            histories: batches of item indices in time order, train part only.
            num_items: catalogue size N.

        Returns:
            Symmetric float64 [N, N] without self pairs, 12 bytes per related ordered pair.
        """
        raise NotImplementedError(f"{type(self).__name__} does not count")


@dataclass(kw_only=True)
class WindowCountsConfig(CountsConfig):
    """Count neighbours in time."""

    kind: Literal["window"] = "window"
    window: int = 3
    """Largest distance of two items in a history that counts as co-occurrence; 3 in the source."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.window, 1, "window")

    def count(self, histories: Iterable[Ragged], num_items: int) -> sp.csr_array:
        """Count how often two items stand at most `window` places apart."""
        return window_counts(histories, num_items, window=self.window)


@dataclass(kw_only=True)
class SwingCountsConfig(CountsConfig):
    """Swing: two items are related where users share them and little else."""

    kind: Literal["swing"] = "swing"
    smoothing: float = 1.0
    """Added to the number of items that two users share (α of the paper)."""
    max_history: int = 100
    """Items of a user that count, the last ones."""
    max_users: int = 500
    """Users of an item that count: pairs of users grow with its square."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.smoothing, 0, "smoothing")
        _require(self.max_history, 2, "max_history")
        _require(self.max_users, 2, "max_users")

    def count(self, histories: Iterable[Ragged], num_items: int) -> sp.csr_array:
        """Add up the agreements of pairs of users; see `swing_scores`."""
        return swing_scores(
            histories,
            num_items,
            smoothing=self.smoothing,
            max_history=self.max_history,
            max_users=self.max_users,
        )


def _require(value: float, least: float, name: str) -> None:
    if value < least:
        raise ConfigError(f"vectors.counts.{name} must be >= {least}, got {value}. Raise it.")
