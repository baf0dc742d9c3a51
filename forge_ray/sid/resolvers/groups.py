"""Counting and ordering rows that share a key: sorts and run lengths, no loop over items."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Int64Array: TypeAlias = npt.NDArray[np.int64]

_DENSE_KEYS_PER_ROW = 8
"""Counting into an array beats sorting while there are at most this many possible keys per row."""


def shared_counts(keys: Int64Array) -> Int64Array:
    """How many rows have each row's key, int64 [n]."""
    if _is_dense(keys):
        return np.asarray(np.bincount(keys)[keys])
    order = np.argsort(keys)
    lengths = run_lengths(keys[order])
    counts = np.empty(len(keys), dtype=np.int64)
    counts[order] = np.repeat(lengths, lengths)
    return counts


def bucket_sizes(keys: Int64Array) -> Int64Array:
    """Rows of each key that occurs, in key order, int64 [distinct]."""
    if _is_dense(keys):
        counts = np.bincount(keys)
        return np.asarray(counts[counts > 0])
    return run_lengths(np.sort(keys))


def run_starts(ordered: npt.NDArray[Any]) -> Int64Array:
    """First row of each run of equal values in an ordered array, int64 [runs]."""
    if not len(ordered):
        return np.zeros(0, dtype=np.int64)
    return np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)).astype(np.int64)


def run_lengths(ordered: npt.NDArray[Any]) -> Int64Array:
    """Rows of each run of equal values in an ordered array, int64 [runs]."""
    return np.diff(np.append(run_starts(ordered), len(ordered)))


def order_by_group(keys: Int64Array, *order_by: npt.NDArray[Any]) -> Int64Array:
    """Rows ordered by key, then by `order_by`, the first of them deciding first. int64 [n]."""
    if len(order_by) == 1 and order_by[0].dtype == np.uint64:
        return _order_by_hash(keys, order_by[0])
    return np.lexsort((*order_by[::-1], keys))


def position_in_group(keys: Int64Array, *order_by: npt.NDArray[Any]) -> Int64Array:
    """0-based position of each row among the rows of its key, ordered by `order_by`. int64 [n]."""
    order = order_by_group(keys, *order_by)
    position = np.empty(len(keys), dtype=np.int64)
    position[order] = positions(keys[order])
    return position


def positions(ordered: npt.NDArray[Any]) -> Int64Array:
    """0-based position of each row in its run of equal values, int64 [n]."""
    starts = run_starts(ordered)
    lengths = np.diff(np.append(starts, len(ordered)))
    return np.arange(len(ordered)) - np.repeat(starts, lengths)


def _is_dense(keys: Int64Array) -> bool:
    return bool(len(keys)) and int(keys.max()) < _DENSE_KEYS_PER_ROW * len(keys)


def _order_by_hash(keys: Int64Array, hashes: npt.NDArray[np.uint64]) -> Int64Array:
    """One sort of (key, leading hash bits) packed into 64; rows that still tie are sorted apart."""
    key_bits = int(keys.max(initial=0)).bit_length()
    if key_bits > 40:
        return np.lexsort((hashes, keys))
    packed = (keys.astype(np.uint64) << np.uint64(63 - key_bits)) | (
        hashes >> np.uint64(key_bits + 1)
    )
    order = np.argsort(packed)
    ordered = packed[order]
    tied = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(tied):
        places = np.union1d(tied, tied + 1)
        rows = order[places]
        order[places] = rows[np.lexsort((hashes[rows], keys[rows]))]
    return order
