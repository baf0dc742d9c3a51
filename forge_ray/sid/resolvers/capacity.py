"""At most `cap` items per SID: the policy that `knn_cap` and `random_cap` share.

The first `cap` items of a SID stay, published ones before all others; the rest (the pool) move to
the first of their candidate last codes that has room, or stay where they are and are counted.
The table is worked through in parts that fit a processor's cache, as many at a time as the process
has threads. Memory: about 45 bytes per row and, for 32,768 pool items per thread at a time, their
candidates and the free places of their prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from forge_ray.errors import ConfigError
from forge_ray.sid.resolvers.base import (
    CandidateSource,
    Int64Array,
    IntArray,
    Placement,
    Problem,
    Resolution,
    ResolverConfig,
)
from forge_ray.sid.resolvers.groups import (
    Groups,
    compact,
    order_by_hash,
    positions,
    run_starts,
)
from forge_ray.threads import map_threads

_PART_ROWS = 1 << 19
_BLOCK_ROWS = 1 << 15
_BLOCK_PLACES = 1 << 24
_LOOKAHEAD = 4
"""Candidates looked at before all others; most items find room among the first few."""


@dataclass(kw_only=True)
class CapacityConfig(ResolverConfig):
    """What both capped policies need.

    Source: FORGE (arXiv 2509.20904), section 3.2 and the SQL of its public code, with a hash of the
    item id in place of `rand()`.
    """

    cap: int = 5
    """Most items a SID may hold, FORGE uses 5 to 25; 5 in its released tables."""
    candidates: int = 200
    """Other last codes tried per item; FORGE exports 200."""
    order: Literal["row", "priority"] = "row"
    """`row`: items choose one after the other. `priority`: all first choices before all second."""

    def __post_init__(self) -> None:
        """Check the capacities."""
        for name in ("cap", "candidates"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"resolver.{name} must be >= 1, got {value}. Raise it.")

    @property
    def capacity(self) -> int:
        """Most items per SID."""
        return self.cap

    def place_with(self, problem: Problem, source: CandidateSource) -> Placement:
        """Move the pool to the candidates that `source` gives."""
        codes = np.array(problem.current())

        def place_part(part: Groups) -> tuple[int, int]:
            moved = ranks_total = 0
            for block in _blocks(problem, part, self.cap):
                options = source(block.rows, self.candidates + 1)
                choice, ranks = self._choose(block, options)
                placed = choice >= 0
                codes[block.rows[placed], -1] = options[placed, choice[placed]]
                moved += int(placed.sum())
                ranks_total += int(ranks[placed].sum())
            return moved, ranks_total

        # Parts are whole prefixes, so no two of them compete for a place or share a row.
        counts = map_threads(place_part, problem.groups.parts(problem.last_size, _PART_ROWS))
        moved, ranks_total = np.array(counts, dtype=np.float64).reshape(-1, 2).sum(axis=0)
        return Placement(codes, {"candidate_rank": float(ranks_total), "moved": float(moved)})

    def finish(self, placement: Placement, problem: Problem) -> Resolution:
        """Say how far down their lists the moved items had to go."""
        resolution = super().finish(placement, problem)
        moved = max(1.0, placement.totals.get("moved", 0.0))
        rank = placement.totals.get("candidate_rank", 0.0) / moved
        return replace(resolution, report={"mean_candidate_rank": rank})

    def _choose(self, block: _Block, options: IntArray) -> tuple[Int64Array, Int64Array]:
        """Index of each item's option, -1 for none, and its 1-based rank among the other codes."""
        width = options.shape[1]
        own_at = _own_position(options, block.own)
        limits = np.where(own_at < width, width, min(self.candidates, width))
        if self.order == "row":
            choice = _place_by_row(block, options, limits)
        else:
            choice = _place_by_priority(block, options, limits, own_at)
        return choice, choice + 1 - (own_at < choice)


def find_pool(problem: Problem, cap: int) -> Int64Array:
    """Rows that must leave their SID, ordered by prefix, then hash; int64 [m]."""
    parts = problem.groups.parts(problem.last_size, _PART_ROWS)
    pools = map_threads(lambda part: _pool_of(problem, part, cap), parts)
    return np.concatenate([np.zeros(0, dtype=np.int64), *pools])


def _pool_of(problem: Problem, part: Groups, cap: int) -> Int64Array:
    crowded = part.crowded(cap)
    rows = crowded.order
    is_old = problem.is_old(rows)
    if is_old.any():
        order = np.lexsort((problem.hashes[rows], ~is_old, crowded.keys))
    else:
        order = order_by_hash(compact(crowded.keys), problem.hashes[rows])
    # Published items come first in their SID, so they are never the ones that must move.
    leaves = (positions(crowded.keys) >= cap) & ~is_old[order]
    pool = rows[order[leaves]]
    prefixes = compact(crowded.keys[leaves] // problem.last_size)
    return pool[order_by_hash(prefixes, problem.hashes[pool])]


@dataclass(frozen=True, eq=False)
class _Block:
    """Pool items of some whole prefixes: the first of every prefix, then the second of each.

    Inside a prefix they stand in the order of their hashes.
    """

    rows: Int64Array
    """int64 [m] rows of the problem."""
    own: IntArray
    """[m] their present last codes."""
    turn_starts: Int64Array
    """int64 [turns] first item of each turn; a turn has at most one item of a prefix."""
    base: Int64Array
    """int64 [m]: `base + code` is the index of a place; code -1 meets one that is always full."""
    free: npt.NDArray[np.int32]
    """int32 [places], changed by placing."""


def _blocks(problem: Problem, part: Groups, cap: int) -> Iterator[_Block]:
    pool = _pool_of(problem, part, cap)
    if not len(pool):
        return
    size, codes = problem.last_size, problem.current()
    prefixes = problem.keys[pool] // size
    starts = np.append(run_starts(prefixes), len(pool))
    slots, held = part.keys[part.starts], _held(part, problem, cap)
    for first, last in _spans(starts, max(1, _BLOCK_PLACES // size)):
        names = prefixes[starts[first:last]]
        inside = slice(*np.searchsorted(slots, [names[0] * size, (names[-1] + 1) * size]))
        owners = slots[inside] // size
        number = np.searchsorted(names, owners)
        known = names[np.minimum(number, len(names) - 1)] == owners
        free = np.full((len(names), size + 1), cap, dtype=np.int32)
        free[:, 0] = 0
        free[number[known], (slots[inside] - owners * size)[known] + 1] -= held[inside][known]
        prefix = np.repeat(np.arange(len(names)), np.diff(starts[first : last + 1]))
        turn = positions(prefix)
        by_turn = np.argsort(turn, kind="stable")
        rows = pool[starts[first] : starts[last]][by_turn]
        base = prefix[by_turn] * (size + 1) + 1
        yield _Block(rows, codes[rows, -1], run_starts(turn[by_turn]), base, free.reshape(-1))


def _held(part: Groups, problem: Problem, cap: int) -> npt.NDArray[np.int32]:
    """Items that stay in each SID in use: all published ones, and others up to `cap`."""
    held = np.minimum(part.sizes, cap)
    if problem.published is not None:
        is_old = problem.is_old(part.order).astype(np.int64)
        held = np.maximum(held, np.add.reduceat(is_old, part.starts))
    return held.astype(np.int32)


def _spans(starts: Int64Array, max_prefixes: int) -> Iterator[tuple[int, int]]:
    """Runs of whole prefixes with about `_BLOCK_ROWS` items, at least one prefix each."""
    first, last = 0, len(starts) - 1
    while first < last:
        until = int(np.searchsorted(starts, starts[first] + _BLOCK_ROWS, side="right")) - 1
        until = min(max(until, first + 1), first + max_prefixes, last)
        yield first, until
        first = until


def _own_position(options: IntArray, own: IntArray) -> Int64Array:
    """Where each row's options name its own code, [m]; the width when they do not."""
    width = options.shape[1]
    at = np.where(options[:, 0] == own, 0, width)
    # Nearest-first lists begin with the own code; only others must be searched.
    others = np.flatnonzero(at)
    matches = options[others] == own[others, None]
    at[others] = np.where(matches.any(axis=1), matches.argmax(axis=1), width)
    return at


def _place_by_row(block: _Block, options: IntArray, limits: Int64Array) -> Int64Array:
    """Index of the option each item gets when items choose one after the other, -1 for none.

    Prefixes do not compete, so the t-th items of all prefixes choose together.
    """
    choice = np.full(len(options), -1, dtype=np.int64)
    ends = np.append(block.turn_starts, len(options)).tolist()
    ahead = block.base[:, None] + options[:, :_LOOKAHEAD]
    for start, end in pairwise(ends):
        turn = slice(start, end)
        chosen = _take_first_free(block.free, ahead[turn], limits[turn], 0)
        choice[turn] = chosen
        left = start + np.flatnonzero(chosen < 0)
        if len(left) and options.shape[1] > _LOOKAHEAD:
            places = block.base[left, None] + options[left, _LOOKAHEAD:]
            choice[left] = _take_first_free(block.free, places, limits[left], _LOOKAHEAD)
    return choice


def _take_first_free(
    free: npt.NDArray[np.int32], places: Int64Array, limits: Int64Array, offset: int
) -> Int64Array:
    """Give rows of distinct prefixes their first place that has room; its column, -1 for none.

    The own code may stand among the options: its SID is full, so it is never chosen.
    """
    is_free = free[places] > 0
    first = is_free.argmax(axis=1)
    each = np.arange(len(places))
    found = is_free[each, first] & (offset + first < limits)
    free[places[each, first][found]] -= 1
    return np.where(found, offset + first, -1)


def _place_by_priority(
    block: _Block, options: IntArray, limits: Int64Array, own_at: Int64Array
) -> Int64Array:
    """Index of the option each item gets when all p-th options precede the next ones, -1 for none.

    An item placed at priority p never moves again; this is the order of FORGE's SQL.
    """
    choice = np.full(len(options), -1, dtype=np.int64)
    waiting = np.arange(len(options))
    for priority in range(options.shape[1]):
        # An item's own code takes no turn: those behind it move up by one.
        at = priority + (own_at[waiting] <= priority)
        has_option = at < limits[waiting]
        waiting, at = waiting[has_option], at[has_option]
        if not len(waiting):
            break
        places = block.base[waiting] + options[waiting, at]
        order = np.argsort(places, kind="stable")
        accepted = np.zeros(len(waiting), dtype=bool)
        accepted[order] = positions(places[order]) < block.free[places[order]]
        choice[waiting[accepted]] = at[accepted]
        np.subtract.at(block.free, places[accepted], 1)
        waiting = waiting[~accepted]
    return choice
