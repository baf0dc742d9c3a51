"""Bootstrap intervals of means over users, mergeable across workers and paired across models.

A replicate gives every user a weight drawn from Poisson(1), by a hash of the user, the replicate
and the seed, instead of drawing users with replacement. So weights need no list of users: any part
of a split adds its share, and two models see the same weights, which makes the difference of their
replicates a paired bootstrap. Knows users by number and metrics by name.

Source: Poisson bootstrap after Chamandy et al., "Estimating Uncertainty for Massive Data Streams"
(Google, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_MOST = 12
"""Largest weight told apart; Poisson(1) exceeds it once in 6e10 draws."""
_CUMULATIVE = np.cumsum([math.exp(-1.0) / math.factorial(value) for value in range(_MOST)])


@dataclass(frozen=True)
class Interval:
    """Percentile interval of a mean, or of a difference of means."""

    low: float
    high: float


class Replicates:
    """Running weighted sums of per-user metrics: `8·metrics·B` bytes, whatever the users."""

    names: tuple[str, ...]
    """Metrics, in row order; empty before the first users."""
    sums: Floats
    """[metrics, B] weighted sums."""
    weights: Floats
    """[B] total weight."""

    def __init__(self, count: int, *, seed: int = 0) -> None:
        """Start without users.

        Args:
            count: replicates B, >= 1.
            seed: of the weights; equal seeds pair two evaluations.
        """
        self.names = ()
        self.sums = np.zeros((0, count))
        self.weights = np.zeros(count)
        self._seed = seed

    def add(self, user_index: npt.NDArray[np.int64], metrics: Mapping[str, Floats]) -> None:
        """Add users.

        Args:
            user_index: int64 [U], the dataset's own numbers.
            metrics: per-user values [U] by name, the same names every time.
        """
        if not self.names:
            self.names = tuple(metrics)
            self.sums = np.zeros((len(self.names), len(self.weights)))
        weights = poisson_weights(user_index, len(self.weights), seed=self._seed)
        self.sums += np.stack([metrics[name] for name in self.names]) @ weights
        self.weights += weights.sum(axis=0)

    def merge(self, other: Replicates) -> None:
        """Add the users of another part."""
        if not other.names:
            return
        if not self.names:
            self.names, self.sums = other.names, np.zeros_like(other.sums)
        self.sums += other.sums
        self.weights += other.weights

    def means(self) -> Floats:
        """Mean of each metric in each replicate, float64 [metrics, B]; NaN without users."""
        # A replicate of very few users may weigh nothing; it says nothing then.
        return self.sums / np.where(self.weights > 0, self.weights, np.nan)


def poisson_weights(user_index: npt.NDArray[np.int64], count: int, *, seed: int) -> Floats:
    """Draw the weights of some users; depends on user, replicate and seed only.

    Args:
        user_index: int64 [U].
        count: replicates B.
        seed: of the draw.

    Returns:
        float64 [U, B] of small whole numbers, mean 1 and variance 1.
    """
    users = _mixed(user_index.astype(np.uint64) ^ _mixed(np.array([seed], dtype=np.uint64)))
    columns = _mixed(np.arange(count, dtype=np.uint64) + np.uint64(0x5851F42D4C957F2D))
    uniform = _mixed(users[:, None] ^ columns) >> np.uint64(11)
    return np.searchsorted(_CUMULATIVE, uniform / 2.0**53, side="right").astype(np.float64)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Bijective mixing of 64-bit numbers (the finaliser of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def interval(replicates: Floats, *, level: float = 0.95) -> Interval:
    """Percentile interval of one metric's replicates [B]; NaN where there are none.

    Args:
        replicates: float64 [B].
        level: share of the replicates inside.
    """
    known = replicates[~np.isnan(replicates)]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
