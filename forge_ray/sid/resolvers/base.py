"""What every collision resolver does: one frozen code table in, one code table out.

A resolver knows codes, their sizes, a hash per item and, on request, how far the last codewords
are from some rows. It knows neither files nor clusters nor models. All resolvers are deterministic
and idempotent, keep every item, leave levels 1..L-1 alone, never change a published row, and are
indifferent to the order of rows: ties are broken by a hash of the item's own id.

A resolver works inside one prefix (the first L - 1 codes) at a time, whatever the other prefixes
hold. A table may therefore be cut by prefix and its pieces resolved anywhere: `place` does a
piece, `finish` the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from forge_ray.config import Component
from forge_ray.data.hashing import distinct_hashes
from forge_ray.errors import ConfigError
from forge_ray.sid.resolvers.groups import Groups, positions, summarize_runs
from forge_ray.sid.table import prefix_keys

Int64Array: TypeAlias = npt.NDArray[np.int64]
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
CandidateSource: TypeAlias = Callable[[Int64Array, int], IntArray]
"""Rows [m] and a limit P -> last codes [m, <= P] of their prefix, best first; -1 ends a short list.
"""
DistanceSource: TypeAlias = Callable[[Int64Array], FloatArray]
"""Rows [m] -> squared distances [m, K_L] to the last codewords, up to a constant per row."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A code table, or all rows of some of its prefixes, and what a resolver may ask about it."""

    codes: IntArray
    """Raw codes [N, L], any integer type."""
    codebook_sizes: tuple[int, ...]
    """Codes available at each level, length L."""
    hashes: npt.NDArray[np.uint64]
    """uint64 [N], distinct: the order of items that are otherwise equal."""
    train_counts: Int64Array | None = None
    """int64 [N] train interactions of each item."""
    candidates: CandidateSource | None = None
    distances: DistanceSource | None = None
    published: IntArray | None = None
    """Resolved codes [N, L'] that must not change, -1 in the rows of new items."""

    @property
    def num_items(self) -> int:
        """Rows N."""
        return len(self.codes)

    @property
    def last_size(self) -> int:
        """Codes of the last level, K_L."""
        return self.codebook_sizes[-1]

    @property
    def is_published(self) -> npt.NDArray[np.bool_]:
        """Rows that must keep their codes, bool [N]."""
        if self.published is None:
            return np.zeros(len(self.codes), dtype=bool)
        return np.asarray(self.published[:, 0] >= 0)

    def is_old(self, rows: Int64Array) -> npt.NDArray[np.bool_]:
        """Which of some rows [m] are published, bool [m]."""
        if self.published is None:
            return np.zeros(len(rows), dtype=bool)
        return np.asarray(self.published[rows, 0] >= 0)

    def current(self) -> IntArray:
        """Codes [N, L]: published where there are any, raw elsewhere."""
        if self.published is None:
            return self.codes
        known = self.published[:, : self.codes.shape[1]]
        return np.where(self.is_published[:, None], known, self.codes)

    @cached_property
    def keys(self) -> Int64Array:
        """Packed current codes, int64 [N]; `key // last_size` is the key of the prefix."""
        return prefix_keys(self.current(), self.codebook_sizes, len(self.codebook_sizes))

    @cached_property
    def groups(self) -> Groups:
        """Rows by current SID."""
        return Groups.of(self.keys)

    def take(self, rows: Int64Array) -> Problem:
        """The same problem for some rows, without the sources that answer by row."""
        return replace(
            self,
            codes=self.codes[rows],
            hashes=self.hashes[rows],
            train_counts=None if self.train_counts is None else self.train_counts[rows],
            published=None if self.published is None else self.published[rows],
            candidates=None,
            distances=None,
        )


@dataclass(frozen=True, eq=False)
class Placement:
    """Codes of a problem's rows after a resolver."""

    codes: IntArray
    """Integers [N, L], or [N, L + 1] with a number inside the SID."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Sums over rows; pieces of one table add up."""


@dataclass(frozen=True, eq=False)
class Resolution:
    """A resolved table."""

    codes: IntArray
    """Integers [N, L'] with L' = L, or L + 1 when a level was appended."""
    codebook_sizes: tuple[int, ...]
    """Codes available at each of the L' levels."""
    over_capacity: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """bool [N]: items beyond the capacity of their SID; they found no place and stayed."""
    report: dict[str, float] = field(default_factory=dict)
    """What happened: items, moved, unplaced, distinct SIDs, largest buckets, and what a kind adds.
    """


@dataclass(kw_only=True)
class ResolverConfig(Component):
    """Which collision policy to apply after encoding; changing it retrains nothing."""

    kind: str = "bucket"

    @property
    def capacity(self) -> int | None:
        """Most items per SID that the policy aims at; None when it leaves buckets alone."""
        return None

    def level_written(self, num_levels: int) -> int | None:
        """The only level the policy writes, of `num_levels` raw ones from 0; None for none."""
        return num_levels - 1

    def rows_to_place(self, problem: Problem) -> Int64Array:
        """Rows whose candidates or distances `place` will ask for, int64 [m]; none by default."""
        return np.zeros(0, dtype=np.int64)

    def place(self, problem: Problem) -> Placement:
        """Give every row of some whole prefixes its codes."""
        raise NotImplementedError(f"{type(self).__name__} does not place items")

    def finish(self, placement: Placement, problem: Problem) -> Resolution:
        """Turn the placement of a whole table into codes, sizes and what this kind reports."""
        return Resolution(placement.codes, problem.codebook_sizes)


def resolve(
    config: ResolverConfig,
    codes: IntArray,
    codebook_sizes: Sequence[int],
    *,
    item_ids: npt.NDArray[Any],
    train_counts: Int64Array | None = None,
    candidates: CandidateSource | None = None,
    distances: DistanceSource | None = None,
    published: IntArray | None = None,
) -> Resolution:
    """Apply a collision policy to a code table in this process.

    Args:
        config: the policy.
        codes: raw integer codes [N, L].
        codebook_sizes: codes available at each level, length L.
        item_ids: distinct ids of the items, strings or integers [N]; they decide every tie.
        train_counts: train interactions [N]; needed by `pop_rank`.
        candidates: nearest last codes of given rows; needed by `knn_cap`.
        distances: distances of given rows to the last codewords; needed by `zcr` and
            `sinkhorn_last`.
        published: resolved codes [N, L'] that must not change, -1 in the rows of new items.

    Returns:
        The resolved codes; every row of `published` that was given is kept as it is.

    Raises:
        ConfigError: when the policy needs something that is not given.
    """
    problem = Problem(
        codes=np.asarray(codes),
        codebook_sizes=tuple(int(size) for size in codebook_sizes),
        hashes=distinct_hashes(item_ids),
        train_counts=train_counts,
        candidates=candidates,
        distances=distances,
        published=None if published is None else np.asarray(published),
    )
    return complete(config, config.place(problem), problem)


def complete(config: ResolverConfig, placement: Placement, problem: Problem) -> Resolution:
    """Finish a whole table, find who is over capacity, and report what happened to it."""
    result = config.finish(placement, problem)
    depth = problem.codes.shape[1]
    ordered = problem.groups.keys
    if problem.published is not None:
        ordered = np.sort(prefix_keys(problem.codes, problem.codebook_sizes, depth))
    before = summarize_runs(ordered)
    keys = prefix_keys(result.codes, result.codebook_sizes, result.codes.shape[1])
    over = np.zeros(len(keys), dtype=bool)
    after = summarize_runs(np.sort(keys))
    if config.capacity is not None and after.longest > config.capacity:
        over[_beyond(keys, problem, config.capacity)] = True
    report = {
        "items": float(len(problem.codes)),
        "moved": float((result.codes[:, depth - 1] != problem.codes[:, depth - 1]).sum()),
        "unplaced": float(over.sum()),
        "distinct_before": float(before.count),
        "distinct_after": float(after.count),
        "max_bucket_before": float(before.longest),
        "max_bucket_after": float(after.longest),
        **result.report,
    }
    return replace(result, over_capacity=over, report=report)


def require_source(source: Any, *, kind: str, name: str) -> None:
    """Refuse a policy that needs vectors for codes that come without any.

    Raises:
        ConfigError: when `source` is None.
    """
    if source is None:
        raise ConfigError(
            f"resolver.kind must be one that needs no {name} for codes without a quantizer, got "
            f"{kind!r}. Set resolver.kind=random_cap or resolver.kind=extra_token."
        )


def _beyond(keys: Int64Array, problem: Problem, capacity: int) -> Int64Array:
    """Rows beyond the capacity of their SID; published ones were there first."""
    crowded = Groups.of(keys).crowded(capacity)
    rows = crowded.order
    order = np.lexsort((problem.hashes[rows], ~problem.is_old(rows), crowded.keys))
    return rows[order][positions(crowded.keys) >= capacity]
