"""`sinkhorn_last`: colliding items spread evenly over the free last codes of their prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from forge_ray.errors import ConfigError
from forge_ray.sid.resolvers.assignment import AssignmentConfig, Movers

_CACHED_CELLS = 1 << 15
"""Plans of this many numbers are normalised together: 256 KB stay in a core's cache."""
_CLOSED = -1e30
"""Log mass of a closed code: no mass, and finite, so that differences are defined."""


@dataclass(kw_only=True)
class SinkhornLastConfig(AssignmentConfig):
    """Make SIDs unique by balanced transport of colliding items to the free codes of their prefix.

    Per prefix group of at most K items: distances are centred and scaled to [-1, 1], the entropic
    plan gives every item the same mass and every open code the same mass, and the assignment of
    largest total log mass takes one code per item. Larger groups stay.

    Source: LC-Rec (arXiv 2311.09049), uniform semantic mapping, and its public code, which repeats
    plan and argmax on each colliding SID for up to 20 rounds. Where we differ: one plan per prefix
    over the codes that are free there, and an assignment in place of the argmax. Both make the
    result unique in one round, the same on a second run, and independent of row order.
    """

    kind: Literal["sinkhorn_last"] = "sinkhorn_last"
    epsilon: float = 0.003
    """Entropy weight relative to half the range of distances; LC-Rec uses 0.003."""
    iterations: int = 50
    """Normalisations of rows and codes; LC-Rec uses 50."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.epsilon > 0:
            raise ConfigError(f"resolver.epsilon must be > 0, got {self.epsilon}. Raise it.")
        if self.iterations < 1:
            raise ConfigError(f"resolver.iterations must be >= 1, got {self.iterations}. Raise it.")

    def costs(self, distances: npt.NDArray[np.float64], movers: Movers) -> npt.NDArray[np.float64]:
        """Minus the log of the plan; prefixes with equally many movers are solved together."""
        costs = np.empty_like(distances)
        for count in np.unique(movers.lengths).tolist():
            alike = np.flatnonzero(movers.lengths == count)
            at_once = max(1, _CACHED_CELLS // (count * distances.shape[1]))
            for start in range(0, len(alike), at_once):
                groups = alike[start : start + at_once]
                rows = movers.starts[groups, None] + np.arange(count)
                costs[rows] = -log_plan(
                    distances[rows],
                    movers.is_open[groups],
                    epsilon=self.epsilon,
                    iterations=self.iterations,
                )
        return costs


def log_plan(
    distances: npt.NDArray[np.float64],
    is_open: npt.NDArray[np.bool_],
    *,
    epsilon: float,
    iterations: int,
) -> npt.NDArray[np.float64]:
    """Log of the entropic transport plans between items and open codes.

    Source: `sk_last` of the LC-Rec code: d ← (d - m) / (max d - m + 1e-5) with m the middle of the
    range, Q ← exp(-d/ε), then `iterations` times rows to 1/B and columns to 1/K. Here in logs, so
    that no ε underflows, and over the open codes only.

    Args:
        distances: float64 [G, B, K].
        is_open: bool [G, K], at least B open codes in each group.
        epsilon: entropy weight.
        iterations: normalisations; the columns come last.

    Returns:
        float64 [G, B, K]: logs of plans of total mass 1; -inf at closed codes.
    """
    closed = ~is_open[:, None, :]
    low = np.where(closed, np.inf, distances).min(axis=(1, 2), keepdims=True)
    high = np.where(closed, -np.inf, distances).max(axis=(1, 2), keepdims=True)
    middle = (low + high) / 2
    plan = -(distances - middle) / (high - middle + 1e-5) / epsilon
    plan = np.where(closed, _CLOSED, plan)
    log_rows = np.log(distances.shape[1])
    log_codes = np.log(is_open.sum(axis=1))[:, None, None]
    for _ in range(iterations):
        plan -= _log_sum_exp(plan, axis=2) + log_rows
        totals = _log_sum_exp(plan, axis=1) + log_codes
        plan -= np.where(closed, 0.0, totals)
    return np.where(closed, -np.inf, plan)


def _log_sum_exp(values: npt.NDArray[np.float64], *, axis: int) -> npt.NDArray[np.float64]:
    """Log of the sum of exponentials along an axis, kept with length 1."""
    largest = values.max(axis=axis, keepdims=True)
    shifted = values - largest
    np.exp(shifted, out=shifted)
    return np.asarray(largest + np.log(shifted.sum(axis=axis, keepdims=True)))
