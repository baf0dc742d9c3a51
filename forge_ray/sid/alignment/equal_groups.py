"""K-means whose clusters have equal sizes: for codebooks, thousands of points and a few groups.

Knows arrays only. K points, G groups.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

FloatArray: TypeAlias = npt.NDArray[np.float64]
Int64Array: TypeAlias = npt.NDArray[np.int64]

_SHARPNESS = (10.0, 30.0, 100.0, 300.0)
"""Inverse temperatures of the price search, relative to the mean cost; the last one decides."""
_SWEEPS = 10


def equal_groups(
    points: npt.NDArray[np.floating], num_groups: int, *, seed: int, iterations: int = 10
) -> Int64Array:
    """Cluster points into groups whose sizes differ by at most one.

    Source: the constrained k-means that LETTER (arXiv 2405.07314) calls, with each assignment
    solved to a small gap instead of exactly by a flow solver.

    Args:
        points: [K, d].
        num_groups: G; at most K of them get members.
        seed: of the first centres.
        iterations: most rounds of assignment and means; stops when no group changes.

    Returns:
        int64 [K] group of each point.
    """
    rows = np.asarray(points, dtype=np.float64)
    num_groups = min(num_groups, len(rows))
    rng = np.random.default_rng(seed)
    centres = rows[rng.choice(len(rows), size=num_groups, replace=False)]
    groups = np.full(len(rows), -1, dtype=np.int64)
    for _ in range(iterations):
        before, groups = groups, equal_assignment(_costs(rows, centres))
        if np.array_equal(before, groups):
            break
        sums = np.zeros_like(centres)
        np.add.at(sums, groups, rows)
        centres = sums / np.bincount(groups, minlength=num_groups)[:, None]
    return groups


def equal_assignment(costs: FloatArray) -> Int64Array:
    """Assign points to groups of equal size at little cost.

    Group prices come from entropic transport; points then choose by cost plus price, and a group
    with too many takes those to whom it matters most.

    Args:
        costs: [K, G] of point and group.

    Returns:
        int64 [K]: groups whose sizes differ by at most one, larger ones first.
    """
    num_points, num_groups = costs.shape
    room = np.full(num_groups, num_points // num_groups)
    room[: num_points % num_groups] += 1
    priced = costs + _prices(costs, room)
    groups = np.full(num_points, -1, dtype=np.int64)
    while (groups < 0).any():
        left = np.flatnonzero(groups < 0)
        # A full group is no choice; every round fills a group or places all that are left.
        choices = np.where(room > 0, priced[left], np.inf)
        chosen = choices.argmin(axis=1)
        best = choices[np.arange(len(left)), chosen]
        choices[np.arange(len(left)), chosen] = np.inf
        regret = choices.min(axis=1) - best if num_groups > 1 else best
        order = np.lexsort((left, -regret, chosen))
        first = np.searchsorted(chosen[order], np.arange(num_groups))
        place = np.arange(len(left)) - first[chosen[order]]
        taken = order[place < room[chosen[order]]]
        groups[left[taken]] = chosen[taken]
        room = room - np.bincount(chosen[taken], minlength=num_groups)
    return groups


def _prices(costs: FloatArray, room: Int64Array) -> FloatArray:
    """What each group must cost so that demand meets its room, [G]."""
    scale = max(float(costs.mean()), 1e-30)
    wanted = np.log(room / room.sum())
    price = np.zeros(costs.shape[1])
    for sharpness in _SHARPNESS:
        scores = -costs * (sharpness / scale)
        for _ in range(_SWEEPS):
            share = scores - price * (sharpness / scale)
            demand = logsumexp(share - logsumexp(share, axis=1, keepdims=True), axis=0)
            demand -= np.log(len(costs))
            price += (demand - wanted) * scale / sharpness
    return price


def _costs(rows: FloatArray, centres: FloatArray) -> FloatArray:
    """Squared distances [K, G]."""
    products = rows @ centres.T
    norms = np.square(rows).sum(axis=1)[:, None] + np.square(centres).sum(axis=1)
    return np.maximum(norms - 2 * products, 0.0)
