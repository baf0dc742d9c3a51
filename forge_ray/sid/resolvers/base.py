"""Collision resolvers: what to do with items that share a semantic ID.

Pure functions of a frozen code table: codes in, codes and a report out. They know neither files nor
vectors; a resolver that needs nearest codes asks a callable for the few rows it wants to move. All
of them are deterministic, idempotent and indifferent to the order of rows, because ties are broken
by a hash of the item's own id and never by its position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from forge_ray.config import Component
from forge_ray.errors import ConfigError
from forge_ray.sid.table import prefix_keys

Int64Array: TypeAlias = npt.NDArray[np.int64]
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]
CandidateSource: TypeAlias = Callable[[Int64Array], Int64Array]
"""Rows [m] -> last-level codes [m, P], best first; -1 marks the end of a short list."""


@dataclass(kw_only=True)
class ResolverConfig(Component):
    """Which collision policy to apply after encoding; changing it retrains nothing."""

    kind: str = "bucket"


@dataclass(kw_only=True)
class BucketConfig(ResolverConfig):
    """Leave collisions alone: a SID is a bucket of items, ranked inside the bucket later."""

    kind: Literal["bucket"] = "bucket"


@dataclass(kw_only=True)
class ExtraTokenConfig(ResolverConfig):
    """Append a level that numbers the items of each SID from 0 on.

    Source: TIGER (arXiv 2305.05065), section 3.1. We number by the hash of the item id.
    """

    kind: Literal["extra_token"] = "extra_token"


@dataclass(kw_only=True)
class KnnCapConfig(ResolverConfig):
    """At most `cap` items per SID; the others move to another last code of the same prefix.

    Source: FORGE (arXiv 2509.20904), section 3.2, in its deterministic form.
    """

    kind: Literal["knn_cap"] = "knn_cap"
    cap: int = 5
    """Most items a SID may hold; 5 in FORGE's released tables."""
    candidates: int = 200
    """Nearest other last codes tried per item; FORGE exports 200."""
    source: Literal["knn", "random"] = "knn"
    """Order of the candidates: by distance to the last codebook, or at random per item."""
    order: Literal["row", "priority"] = "row"
    """`row`: items choose one after the other. `priority`: all first choices before all second."""
    seed: int = 0
    """Seed of the random candidate order; unused with `knn`."""

    def __post_init__(self) -> None:
        """Check the capacities."""
        for name in ("cap", "candidates"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"resolver.{name} must be >= 1, got {value}. Raise it.")


@dataclass(frozen=True, eq=False)
class Resolution:
    """Codes after a resolver."""

    codes: Int64Array
    """int64 [N, L'] with L' = L, or L + 1 when a level was appended."""
    codebook_sizes: tuple[int, ...]
    """Codes available at each of the L' levels."""
    over_capacity: npt.NDArray[np.bool_]
    """bool [N]: items that found no place and stay on their original, overfull SID."""
    report: dict[str, float] = field(default_factory=dict)
    """What happened: items, moved, unplaced, bucket sizes, mean candidate rank."""


def resolve(
    config: ResolverConfig,
    codes: IntArray,
    codebook_sizes: Sequence[int],
    *,
    item_ids: npt.NDArray[Any],
    candidates: CandidateSource | None = None,
    published: IntArray | None = None,
) -> Resolution:
    """Apply a collision policy to a code table.

    Args:
        config: the policy.
        codes: raw integer codes [N, L].
        codebook_sizes: codes available at each level, length L.
        item_ids: distinct ids of the items, strings or integers [N]; they decide every tie.
        candidates: nearest other last codes of given rows; needed by `knn_cap` with source `knn`.
        published: resolved codes [N, L'] that must not change, -1 in the rows of new items.

    Returns:
        The resolved codes; every row of `published` that was given is kept as it is.

    Raises:
        ConfigError: when the policy needs candidates and none are given.
    """
    raw: Int64Array = np.asarray(codes, dtype=np.int64)
    sizes = tuple(int(size) for size in codebook_sizes)
    hashes = hash_ids(item_ids)
    rank = _unique_rank(hashes, item_ids)
    frozen: Int64Array | None = None
    if published is not None:
        frozen = np.asarray(published, dtype=np.int64)
    if isinstance(config, ExtraTokenConfig):
        resolution = _append_token(raw, sizes, rank, frozen)
    elif isinstance(config, KnnCapConfig):
        source = _candidate_source(config, candidates, hashes, sizes[-1])
        resolution = _cap(config, raw, sizes, rank, source, frozen)
    else:
        kept = raw if frozen is None else np.where(frozen >= 0, frozen, raw)
        resolution = Resolution(kept, sizes, np.zeros(len(raw), dtype=bool))
    return _with_report(resolution, raw, sizes)


def hash_ids(item_ids: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Hash item ids to 64 bits, equal for an integer and its decimal spelling.

    Args:
        item_ids: strings or integers [N].

    Returns:
        uint64 [N]: a polynomial over the characters, finished by splitmix64. The value of an id
        depends on nothing but the id, on any machine and in any batch.
    """
    text = np.ascontiguousarray(np.asarray(item_ids).astype(str))
    width = text.dtype.itemsize // 4
    letters = text.view(np.uint32).reshape(len(text), width)
    state = np.full(len(text), 0xCBF29CE484222325, dtype=np.uint64)
    for column in letters.T:
        step = (state ^ column) * np.uint64(0x100000001B3)
        state = np.where(column == 0, state, step)
    return splitmix64(state)


def splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64-bit integers so that every input bit reaches every output bit. uint64, any shape."""
    mixed = state + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def random_candidates(
    hashes: npt.NDArray[np.uint64], size: int, limit: int, *, seed: int
) -> Int64Array:
    """Give each item its own random order of last codes, independent of all other items.

    Args:
        hashes: id hashes [m].
        size: codes of the last level.
        limit: codes to keep per item.
        seed: another seed gives other orders.

    Returns:
        int64 [m, min(limit, size)]: distinct codes. Works through 2^22 draws at a time.
    """
    salt = splitmix64(np.array([seed], dtype=np.int64).astype(np.uint64))
    codes = splitmix64(np.arange(size, dtype=np.uint64)) ^ salt
    out = np.empty((len(hashes), min(limit, size)), dtype=np.int64)
    step = max(1, 2**22 // size)
    for start in range(0, len(hashes), step):
        draws = splitmix64(hashes[start : start + step, None] ^ codes)
        out[start : start + step] = np.argsort(draws, axis=1, kind="stable")[:, :limit]
    return out


def _unique_rank(hashes: npt.NDArray[np.uint64], item_ids: npt.NDArray[Any]) -> Int64Array:
    """Position of every item in the order (hash, id), int64 [N]."""
    order = np.argsort(hashes, kind="stable")
    if len(order) and not np.all(np.diff(hashes[order])):
        # Two ids share a hash: compare the ids themselves, which is slow and all but never needed.
        order = np.lexsort((np.asarray(item_ids).astype(str), hashes))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _position_in_group(keys: Int64Array, order_by: Int64Array) -> Int64Array:
    """0-based position of each row among the rows of its key, by ascending `order_by`."""
    order = np.lexsort((order_by, keys))
    sorted_keys = keys[order]
    starts = np.flatnonzero(np.diff(sorted_keys, prepend=sorted_keys[:1] - 1))
    lengths = np.diff(np.append(starts, len(keys)))
    position = np.empty(len(keys), dtype=np.int64)
    position[order] = np.arange(len(keys)) - np.repeat(starts, lengths)
    return position


def _append_token(
    codes: Int64Array, sizes: tuple[int, ...], rank: Int64Array, published: Int64Array | None
) -> Resolution:
    keys = prefix_keys(codes, sizes, len(sizes))
    none_over = np.zeros(len(codes), dtype=bool)
    if published is None and len(np.unique(keys)) == len(keys):
        return Resolution(codes, sizes, none_over)
    token = _position_in_group(keys, rank)
    if published is not None:
        codes, token = _continue_numbers(codes, sizes, rank, published)
    extended = np.column_stack([codes, token])
    return Resolution(extended, (*sizes, int(token.max(initial=0)) + 1), none_over)


def _continue_numbers(
    codes: Int64Array, sizes: tuple[int, ...], rank: Int64Array, published: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Codes and tokens of an append: new items take the numbers after a SID's largest one."""
    depth = len(sizes)
    old = published[:, 0] >= 0
    codes = np.where(old[:, None], published[:, :depth], codes)
    if published.shape[1] == depth:
        # The published table had no collision and no extra level: each item was number 0.
        published = np.column_stack([published, np.where(old, 0, -1)])
    keys = prefix_keys(codes, sizes, depth)
    _, group = np.unique(keys, return_inverse=True)
    largest = np.full(group.max(initial=-1) + 1, -1, dtype=np.int64)
    np.maximum.at(largest, group[old], published[old, depth])
    new = _position_in_group(keys, np.where(old, rank + len(rank), rank))
    token = np.where(old, published[:, depth], largest[group] + 1 + new)
    return codes, token


def _candidate_source(
    config: KnnCapConfig,
    candidates: CandidateSource | None,
    hashes: npt.NDArray[np.uint64],
    size: int,
) -> CandidateSource:
    if config.source == "random":
        return lambda rows: random_candidates(
            hashes[rows], size, config.candidates + 1, seed=config.seed
        )
    if candidates is None:
        raise ConfigError(
            "resolver.source must be 'random' for codes without a quantizer, got 'knn'. "
            "Set resolver.source=random."
        )
    return candidates


def _cap(
    config: KnnCapConfig,
    codes: Int64Array,
    sizes: tuple[int, ...],
    rank: Int64Array,
    source: CandidateSource,
    published: Int64Array | None,
) -> Resolution:
    """The capped policy: keep the first `cap` of each SID, then move the rest.

    Source: the SQL of FORGE's public code (al_sid), with a hash of the id in place of `rand()`.
    """
    old = np.zeros(len(codes), dtype=bool)
    if published is not None:
        old = published[:, 0] >= 0
        codes = np.where(old[:, None], published, codes)
    keys = prefix_keys(codes, sizes, len(sizes))
    # Published items come first in their SID, so they are never the ones that must move.
    position = _position_in_group(keys, np.where(old, rank - len(rank), rank))
    pool = np.flatnonzero((position >= config.cap) & ~old)
    pool = pool[np.argsort(rank[pool])]
    slots, counts = np.unique(np.delete(keys, pool), return_counts=True)
    options = _options(source(pool), codes[pool, -1], config.candidates) if len(pool) else _NONE
    free = _FreePlaces(slots, counts, config.cap)
    base = keys[pool] - codes[pool, -1]
    place = _place_by_row if config.order == "row" else _place_by_priority
    choice = place(base, options, free)
    return _moved(codes, sizes, pool, options, choice)


_NONE = np.zeros((0, 1), dtype=np.int64)


def _options(candidates: Int64Array, own: Int64Array, limit: int) -> Int64Array:
    """Candidate codes without the item's own one, padded with -1. int64 [m, P]."""
    usable = (candidates >= 0) & (candidates != own[:, None])
    order = np.argsort(~usable, axis=1, kind="stable")[:, :limit]
    padded = np.where(usable, candidates, -1)
    return np.take_along_axis(padded, order, axis=1)


def _moved(
    codes: Int64Array,
    sizes: tuple[int, ...],
    pool: Int64Array,
    options: Int64Array,
    choice: Int64Array,
) -> Resolution:
    placed = choice >= 0
    resolved = codes.copy()
    resolved[pool[placed], -1] = options[placed, choice[placed]]
    over_capacity = np.zeros(len(codes), dtype=bool)
    over_capacity[pool[~placed]] = True
    mean_rank = float(choice[placed].mean() + 1) if placed.any() else 0.0
    return Resolution(resolved, sizes, over_capacity, {"mean_candidate_rank": mean_rank})


@dataclass(frozen=True)
class _FreePlaces:
    """Places that the items which stay leave in each SID."""

    slots: Int64Array
    counts: Int64Array
    cap: int

    def __call__(self, keys: Int64Array) -> Int64Array:
        if not len(self.slots):
            return np.full(len(keys), self.cap, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.slots, keys), len(self.slots) - 1)
        held = np.where(self.slots[at] == keys, self.counts[at], 0)
        return np.maximum(self.cap - held, 0)


def _place_by_row(base: Int64Array, options: Int64Array, free: _FreePlaces) -> Int64Array:
    """Index of the option each item gets when items choose in row order, -1 for none.

    Serial choice equals deferred acceptance when every SID prefers earlier items: all items propose
    at once, a SID keeps its first ones, the others try their next option. The result does not
    depend on the order of proposals, so each round is a handful of array operations.
    """
    num_options = options.shape[1]
    rows = np.arange(len(base))
    choice = np.zeros(len(base), dtype=np.int64)
    active = np.zeros(len(base), dtype=bool) if not num_options else options[:, 0] >= 0
    while active.any():
        live = rows[active]
        keys = base[live] + options[live, choice[live]]
        rejected = live[_position_in_group(keys, live) >= free(keys)]
        if not len(rejected):
            break
        choice[rejected] += 1
        following = np.minimum(choice[rejected], num_options - 1)
        exhausted = (choice[rejected] >= num_options) | (options[rejected, following] < 0)
        active[rejected[exhausted]] = False
    return np.where(active, choice, -1)


def _place_by_priority(base: Int64Array, options: Int64Array, free: _FreePlaces) -> Int64Array:
    """Index of the option each item gets when all p-th options precede the next ones, -1 for none.

    An item placed at priority p never moves again; this is the order of FORGE's SQL.
    """
    choice = np.full(len(base), -1, dtype=np.int64)
    taken = np.zeros(0, dtype=np.int64)
    for priority in range(options.shape[1]):
        waiting = np.flatnonzero((choice < 0) & (options[:, priority] >= 0))
        if not len(waiting):
            continue
        keys = base[waiting] + options[waiting, priority]
        used = np.searchsorted(taken, keys, side="right") - np.searchsorted(taken, keys)
        accepted = _position_in_group(keys, waiting) < free(keys) - used
        choice[waiting[accepted]] = priority
        taken = np.sort(np.concatenate([taken, keys[accepted]]))
    return choice


def _with_report(resolution: Resolution, codes: Int64Array, sizes: tuple[int, ...]) -> Resolution:
    before = _bucket_sizes(codes, sizes)
    after = _bucket_sizes(resolution.codes, resolution.codebook_sizes)
    shared = resolution.codes[:, : codes.shape[1]]
    report = {
        "items": float(len(codes)),
        "moved": float((shared != codes).any(axis=1).sum()),
        "unplaced": float(resolution.over_capacity.sum()),
        "distinct_before": float(len(before)),
        "distinct_after": float(len(after)),
        "max_bucket_before": float(before.max(initial=0)),
        "max_bucket_after": float(after.max(initial=0)),
        **resolution.report,
    }
    return Resolution(resolution.codes, resolution.codebook_sizes, resolution.over_capacity, report)


def _bucket_sizes(codes: Int64Array, sizes: tuple[int, ...]) -> Int64Array:
    keys = prefix_keys(codes, sizes, len(sizes))
    return np.unique(keys, return_counts=True)[1].astype(np.int64)
