"""At most `cap` items per SID: the policy that `knn_cap` and `random_cap` share.

The first `cap` items of a SID stay, published ones before all others; the rest (the pool) move to
the first of their candidate last codes that has room, or stay where they are and are counted.
Memory: about 60 bytes per row of the table and, for a block of 65,536 pool items at a time, their
candidates and the free places of their prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

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
    order_by_group,
    positions,
    run_lengths,
    run_starts,
    shared_counts,
)

_BLOCK_ROWS = 1 << 16
_BLOCK_PLACES = 1 << 24
_LOOKAHEAD = (4, 16, 64)
"""Candidates looked at together; most items find room among the first few."""


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
        pool = find_pool(problem, self.cap)
        codes = np.array(problem.current())
        rank_total = 0
        for block in _blocks(pool, problem, self.cap):
            options = source(block.rows, self.candidates + 1)
            choice, ranks = self._choose(block, options)
            placed = choice >= 0
            codes[block.rows[placed], -1] = options[placed, choice[placed]]
            rank_total += int(ranks[placed].sum())
        return Placement(codes, {"candidate_rank": float(rank_total)})

    def finish(self, placement: Placement, problem: Problem) -> Resolution:
        """Say how far down their lists the moved items had to go."""
        resolution = super().finish(placement, problem)
        known = problem.current()
        moved = max(1, int((placement.codes[:, -1] != known[:, -1]).sum()))
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
    keys = problem.keys()
    crowded = np.flatnonzero(shared_counts(keys) > cap)
    is_old = problem.is_published[crowded]
    if is_old.any():
        order = order_by_group(keys[crowded], ~is_old, problem.hashes[crowded])
    else:
        order = order_by_group(keys[crowded], problem.hashes[crowded])
    rows = crowded[order]
    pool = rows[(positions(keys[rows]) >= cap) & ~is_old[order]]
    return pool[order_by_group(keys[pool] // problem.last_size, problem.hashes[pool])]


@dataclass(frozen=True, eq=False)
class _Block:
    """Pool items of some whole prefixes, ordered by prefix, then hash."""

    rows: Int64Array
    """int64 [m] rows of the problem."""
    own: IntArray
    """[m] their present last codes."""
    prefix: Int64Array
    """int64 [m] prefix of each item, numbered inside the block."""
    base: Int64Array
    """int64 [m]: `base + code` is the index of a place; code -1 meets one that is always full."""
    free: Int64Array
    """int64 [places], changed by placing."""


def _blocks(pool: Int64Array, problem: Problem, cap: int) -> Iterator[_Block]:
    if not len(pool):
        return
    size, codes = problem.last_size, problem.current()
    keys = problem.keys()
    prefixes = keys[pool] // size
    starts = np.append(run_starts(prefixes), len(pool))
    held, counts = _held(keys, pool, cap, problem)
    for first, last in _spans(starts, max(1, _BLOCK_PLACES // size)):
        span = slice(starts[first], starts[last])
        names = prefixes[starts[first:last]]
        inside = slice(*np.searchsorted(held, [names[0] * size, (names[-1] + 1) * size]))
        number = np.searchsorted(names, held[inside] // size)
        known = names[np.minimum(number, len(names) - 1)] == held[inside] // size
        free = np.full((len(names), size + 1), cap, dtype=np.int64)
        free[:, 0] = 0
        free[number[known], held[inside][known] % size + 1] -= counts[inside][known]
        lengths = np.diff(starts[first : last + 1])
        prefix = np.repeat(np.arange(len(names)), lengths)
        rows = pool[span]
        yield _Block(rows, codes[rows, -1], prefix, prefix * (size + 1) + 1, free.reshape(-1))


def _held(
    keys: Int64Array, pool: Int64Array, cap: int, problem: Problem
) -> tuple[Int64Array, Int64Array]:
    """Keys of the SIDs in use, ascending, and the items that stay in each."""
    stays = np.ones(len(keys), dtype=bool)
    stays[pool] = False
    ordered = np.sort(keys[stays])
    return ordered[run_starts(ordered)], run_lengths(ordered)


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
    turn = positions(block.prefix)
    by_turn = np.argsort(turn, kind="stable")
    ends = np.append(run_starts(turn[by_turn]), len(turn))
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        _choose_first_free(block, options, limits, by_turn[start:end], choice)
    return choice


def _choose_first_free(
    block: _Block, options: IntArray, limits: Int64Array, rows: Int64Array, choice: Int64Array
) -> None:
    """Give rows of distinct prefixes their first option that has room.

    The own code may stand among the options: its SID is full, so it is never chosen.
    """
    width, at = options.shape[1], 0
    for end in (*(one for one in _LOOKAHEAD if one < width), width):
        places = block.base[rows, None] + options[rows, at:end]
        is_free = block.free[places] > 0
        first = is_free.argmax(axis=1)
        found = is_free[np.arange(len(rows)), first] & (at + first < limits[rows])
        choice[rows[found]] = at + first[found]
        block.free[places[found, first[found]]] -= 1
        rows, at = rows[~found], end
        if not len(rows):
            return


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
