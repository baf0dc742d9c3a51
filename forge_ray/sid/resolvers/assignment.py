"""One item per SID by an optimal assignment per prefix; shared by `zcr` and `sinkhorn_last`.

The colliding items of a prefix and the last codes that no other item of it holds form one cost
matrix, solved exactly. A prefix with more items than codes is left as it is. Memory: a block of
cost rows, at most 2^22 numbers of 8 bytes and a few arrays of that size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from forge_ray.sid.resolvers.base import (
    Int64Array,
    IntArray,
    Placement,
    Problem,
    Resolution,
    ResolverConfig,
    require_source,
)
from forge_ray.sid.resolvers.groups import compact, order_by_hash, run_lengths, run_starts

_BLOCK_CELLS = 1 << 22


@dataclass(frozen=True, eq=False)
class Movers:
    """Colliding items of some whole prefixes, ordered by prefix, then hash."""

    rows: Int64Array
    """int64 [m] rows of the problem."""
    own: IntArray
    """[m] their present last codes."""
    starts: Int64Array
    """int64 [groups] first mover of each prefix."""
    is_open: npt.NDArray[np.bool_]
    """bool [groups, K]: codes that no other item of the prefix holds."""

    @property
    def lengths(self) -> Int64Array:
        """Movers of each prefix, int64 [groups]."""
        return np.diff(np.append(self.starts, len(self.rows)))


@dataclass(kw_only=True)
class AssignmentConfig(ResolverConfig):
    """What resolvers by assignment share; a kind says what a move costs."""

    @property
    def capacity(self) -> int:
        """One item per SID."""
        return 1

    @abstractmethod
    def costs(self, distances: npt.NDArray[np.float64], movers: Movers) -> npt.NDArray[np.float64]:
        """Cost of giving each code to each mover, float64 [m, K]; closed codes are ignored.

        Args:
            distances: squared distances [m, K], 0 for the nearest codeword of each mover.
            movers: who moves, and which codes are open.
        """

    def rows_to_place(self, problem: Problem) -> Int64Array:
        """New items that share their SID, in prefixes with no more items than codes."""
        return _find_movers(problem)

    def place(self, problem: Problem) -> Placement:
        """Assign the colliding items of every prefix.

        Raises:
            ConfigError: when no distances are given.
        """
        source = problem.distances
        require_source(source, kind=self.kind, name="distances")
        assert source is not None
        codes = np.array(problem.current())
        before = after = moved = 0.0
        for movers in _blocks(_find_movers(problem), problem):
            distances = np.asarray(source(movers.rows), dtype=np.float64)
            distances = distances - distances.min(axis=1, keepdims=True)
            chosen = _assign(self.costs(distances, movers), movers)
            codes[movers.rows, -1] = chosen
            each = np.arange(len(chosen))
            before += float(distances[each, movers.own].sum())
            after += float(distances[each, chosen].sum())
            moved += float((chosen != movers.own).sum())
        totals = {"distance_before": before, "distance_after": after, "moved": moved}
        return Placement(codes, totals)

    def finish(self, placement: Placement, problem: Problem) -> Resolution:
        """Say what moving costs, and how many prefixes were too large."""
        resolution = super().finish(placement, problem)
        totals = placement.totals
        added = totals.get("distance_after", 0.0) - totals.get("distance_before", 0.0)
        shared = problem.groups.keys[problem.groups.starts[problem.groups.sizes > 1]]
        stuck = np.unique(shared[~_fits(problem, shared)] // problem.last_size)
        report = {
            "mean_distance_added": added / max(1.0, totals.get("moved", 0.0)),
            "prefixes_too_large": float(len(stuck)),
        }
        return replace(resolution, report=report)


def _find_movers(problem: Problem) -> Int64Array:
    """Rows that take part in an assignment, ordered by prefix, then hash; int64 [m]."""
    crowded = problem.groups.crowded(1)
    kept = _fits(problem, crowded.keys) & ~problem.is_old(crowded.order)
    rows = crowded.order[kept]
    prefixes = compact(crowded.keys[kept] // problem.last_size)
    return rows[order_by_hash(prefixes, problem.hashes[rows])]


def _fits(problem: Problem, keys: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether the prefix of each key [m], ascending, has no more items than codes."""
    prefixes = problem.groups.keys // problem.last_size
    starts = run_starts(prefixes)
    at = np.searchsorted(prefixes[starts], keys // problem.last_size)
    return np.asarray(run_lengths(prefixes)[at] <= problem.last_size)


def _blocks(rows: Int64Array, problem: Problem) -> Iterator[Movers]:
    if not len(rows):
        return
    size = problem.last_size
    keys, own = problem.keys, problem.current()[rows, -1]
    prefixes = keys[rows] // size
    stays = np.ones(len(keys), dtype=bool)
    stays[rows] = False
    held = np.sort(keys[stays])
    starts = np.append(run_starts(prefixes), len(rows))
    first, last = 0, len(starts) - 1
    while first < last:
        limit = starts[first] + max(1, _BLOCK_CELLS // size)
        until = max(int(np.searchsorted(starts, limit, side="right")) - 1, first + 1)
        names = prefixes[starts[first:until]]
        places = slice(starts[first], starts[until])
        yield Movers(
            rows=rows[places],
            own=own[places],
            starts=starts[first:until] - starts[first],
            is_open=_open_codes(held, names, size),
        )
        first = until


def _open_codes(held: Int64Array, names: Int64Array, size: int) -> npt.NDArray[np.bool_]:
    """Codes that nobody holds who stays, bool [groups, K]; `held` is sorted."""
    inside = held[slice(*np.searchsorted(held, [names[0] * size, (names[-1] + 1) * size]))]
    group = np.minimum(np.searchsorted(names, inside // size), len(names) - 1)
    known = names[group] == inside // size
    is_open = np.ones((len(names), size), dtype=bool)
    is_open[group[known], inside[known] % size] = False
    return is_open


def _assign(costs: npt.NDArray[np.float64], movers: Movers) -> Int64Array:
    """Last code of each mover, int64 [m]. One exact assignment per prefix (Hungarian method)."""
    chosen = np.empty(len(movers.rows), dtype=np.int64)
    costs[~np.repeat(movers.is_open, movers.lengths, axis=0)] = np.inf
    ends = movers.starts + movers.lengths
    for start, end in zip(movers.starts.tolist(), ends.tolist(), strict=True):
        chosen[start:end] = linear_sum_assignment(costs[start:end])[1]
    return chosen


def per_group(values: npt.NDArray[Any], movers: Movers) -> npt.NDArray[Any]:
    """One value per prefix [groups] repeated for its movers [m, 1]."""
    return np.repeat(values, movers.lengths)[:, None]
