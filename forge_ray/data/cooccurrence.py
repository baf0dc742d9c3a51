"""Which items occur together in histories: counts within a window, and Swing scores.

Pure NumPy and SciPy kernels over batches of histories. They know nothing about files, clusters or
splits: the caller passes train histories, since a count taken from validation or test would leak
the transitions that a model is later judged on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged

BLOCK_ENTRIES = 4_000_000
"""Matrix entries a kernel expands at a time; 64 MB at 16 bytes each."""


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Distinct ordered pairs and how often they occur.

    Attributes:
        keys: ``[P]`` int64 ``anchor * num_items + positive``, sorted.
        counts: ``[P]`` int64.
    """

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]


def count_pairs(items: Ragged, *, window: int, num_items: int) -> PairCounts:
    """Count ordered pairs of different items within ``window`` places of one history.

    Every occurrence counts in both directions, so the counts are symmetric.

    Args:
        items: histories of item indices in time order.
        window: largest distance.
        num_items: catalogue size N, below 2^31.
    """
    values, rows = items.values.astype(np.int64), items.row_ids
    found = []
    for distance in range(1, window + 1):
        left, right = values[:-distance], values[distance:]
        near = (rows[:-distance] == rows[distance:]) & (left != right)
        found += [left[near] * num_items + right[near], right[near] * num_items + left[near]]
    keys = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    return PairCounts(*np.unique(keys, return_counts=True))


def merge_counts(keys: NDArray[np.int64], counts: NDArray[np.int64]) -> PairCounts:
    """Add up counts of equal keys."""
    distinct, place = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(sums, place, counts)
    return PairCounts(distinct, sums)


def window_counts(histories: Iterable[Ragged], num_items: int, *, window: int) -> sp.csr_array:
    """Count how often two items stand at most ``window`` places apart in one history.

    Args:
        histories: batches of histories, item indices in time order.
        num_items: catalogue size N, below 2^31.
        window: largest distance, >= 1.

    Returns:
        Symmetric float64 [N, N] counts without self pairs. Takes 12 bytes per ordered pair, three
        times that while the last parts are added, and blocks of `BLOCK_ENTRIES`.
    """
    parts = (
        _as_matrix(count_pairs(piece, window=window, num_items=num_items), num_items)
        for batch in histories
        for rows in _blocks(2 * window * batch.lengths)
        for piece in [batch.take(np.arange(rows.start, rows.stop))]
    )
    return add_up(parts, num_items)


def swing_scores(
    histories: Iterable[Ragged],
    num_items: int,
    *,
    smoothing: float,
    max_history: int,
    max_users: int,
) -> sp.csr_array:
    """Score pairs of items by the pairs of users who chose both and agree on little else.

    ``s(i, j) = Σ_{u < v, both with i and j} w_u · w_v / (smoothing + |I_u ∩ I_v|)`` with
    ``w_u = 1 / sqrt(|I_u|)``.

    Source: Swing, Yang et al. (arXiv 2010.05525). Where we differ: I_u is the set of the user's
    last ``max_history`` items, and an item counts its first ``max_users`` users only (batches come
    in an order that is random in the users), which bounds the pairs of users by
    ``N · max_users² / 2``.

    Args:
        histories: batches of histories, item indices in time order.
        num_items: catalogue size N.
        smoothing: added to the number of common items, >= 0.
        max_history: most items of one user.
        max_users: most users of one item.

    Returns:
        Symmetric float64 [N, N] scores without self pairs. Takes 12 bytes per ordered pair (three
        times that while adding up), 16 bytes per user-item, and blocks of `BLOCK_ENTRIES`.
    """
    choices, weight = _choices(histories, num_items, max_history, max_users)
    by_item = choices.T.tocsr()
    sizes = np.diff(choices.indptr).astype(np.int64)
    # How many users a user meets, with repetition, bounds the row of the product below.
    met = choices @ np.diff(by_item.indptr).astype(np.int64)
    parts = (
        _swing_block(choices, weight, meetings.part(block), smoothing)
        for rows in _blocks(met)
        for meetings in [_meetings(choices, by_item, rows)]
        for block in _blocks(sizes[meetings.first] + sizes[meetings.second])
    )
    return add_up(parts, num_items)


def add_up(parts: Iterable[sp.csr_array], num_items: int) -> sp.csr_array:
    """Add sparse [N, N] matrices, each entry log(number of parts) times instead of once per part.

    Args:
        parts: canonical CSR matrices; read one at a time.
        num_items: N.
    """
    stack: list[sp.csr_array] = []
    for part in parts:
        total = part
        # Like carries of a binary counter: only sums of similar size are merged.
        while stack and stack[-1].nnz <= 2 * total.nnz:
            total = stack.pop() + total
        stack.append(total)
    total = sp.csr_array((num_items, num_items), dtype=np.float64)
    while stack:
        total = stack.pop() + total
    return sp.csr_array(total)


def _as_matrix(pairs: PairCounts, num_items: int) -> sp.csr_array:
    anchor, positive = np.divmod(pairs.keys, num_items)
    starts = np.searchsorted(anchor, np.arange(num_items + 1))
    index = np.int32 if len(pairs.keys) < 2**31 else np.int64
    entries = (pairs.counts.astype(np.float64), positive.astype(index), starts.astype(index))
    return sp.csr_array(entries, shape=(num_items, num_items))


def _choices(
    histories: Iterable[Ragged], num_items: int, max_history: int, max_users: int
) -> tuple[sp.csr_array, NDArray[np.float64]]:
    """Users x items as 0/1, and the weight of every user."""
    sets = [_distinct(batch.tail(max_history), num_items) for batch in histories]
    users = Ragged.concatenate(sets) if sets else Ragged.from_lists([], dtype=np.int64)
    weight = 1 / np.sqrt(np.maximum(users.lengths, 1))
    users = users.filter(_rank_within(users.values) < max_users)
    entries = (np.ones(len(users.values), dtype=np.int32), users.values, users.offsets)
    return sp.csr_array(entries, shape=(len(users), num_items)), weight


def _distinct(batch: Ragged, num_items: int) -> Ragged:
    keys = np.unique(batch.row_ids * num_items + batch.values)
    row, item = np.divmod(keys, num_items)
    return Ragged.from_lengths(item.astype(np.int32), np.bincount(row, minlength=len(batch)))


def _rank_within(values: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many equal values stand before each value."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return rank


def _blocks(entries: NDArray[np.int64]) -> Iterator[slice]:
    """Ranges that expand to at most `BLOCK_ENTRIES` entries each, one row at least."""
    total = np.cumsum(entries)
    start = 0
    while start < len(total):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + BLOCK_ENTRIES, side="right")))
        yield slice(start, stop)
        start = stop


@dataclass(frozen=True, slots=True)
class _Meetings:
    """Pairs of users u < v with at least two items in common."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    common: NDArray[np.int64]

    def part(self, block: slice) -> _Meetings:
        return _Meetings(self.first[block], self.second[block], self.common[block])


def _meetings(choices: sp.csr_array, by_item: sp.csr_array, rows: slice) -> _Meetings:
    """The meetings whose u is in `rows`; one item in common gives no pair of different items."""
    common = sp.coo_array(choices[rows] @ by_item)
    first, second = common.coords[0].astype(np.int64) + rows.start, common.coords[1]
    kept = (second > first) & (common.data > 1)
    return _Meetings(first[kept], second[kept].astype(np.int64), common.data[kept])


def _swing_block(
    choices: sp.csr_array, weight: NDArray[np.float64], users: _Meetings, smoothing: float
) -> sp.csr_array:
    """What some meetings add to the scores."""
    both = sp.csr_array(choices[users.first].multiply(choices[users.second]))
    value = weight[users.first] * weight[users.second] / (smoothing + users.common)
    scaled = sp.csr_array(
        (np.repeat(value, np.diff(both.indptr)), both.indices, both.indptr), shape=both.shape
    )
    scores = sp.coo_array(both.T.tocsr() @ scaled)
    item, other = scores.coords
    apart = item != other
    entries = (scores.data[apart], (item[apart], other[apart]))
    return sp.coo_array(entries, shape=scores.shape).tocsr()
