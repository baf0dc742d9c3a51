"""Sorting rows by a key and counting its runs; no loop over items.

A sort of plain 64-bit numbers is several times faster than an indirect one, so key, leading hash
bits and row number are packed into one number wherever they fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Int64Array: TypeAlias = npt.NDArray[np.int64]
UInt64Array: TypeAlias = npt.NDArray[np.uint64]

_LEAST_HASH_BITS = 12
"""With fewer leading hash bits in the packed number, too many rows tie and are sorted again."""

_ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of a table, group by group."""

    order: Int64Array
    """int64 [n] rows in the order of their keys."""
    keys: Int64Array
    """int64 [n] keys, ascending."""

    @classmethod
    def of(cls, keys: Int64Array) -> Groups:
        """Group rows by key [n], non-negative; the order inside a group is arbitrary."""
        row_bits = len(keys).bit_length()
        if int(keys.max(initial=0)).bit_length() + row_bits > 63:
            order = np.argsort(keys)
            return cls(order, keys[order])
        packed = keys << row_bits
        for start in range(0, len(keys), _ROWS_AT_ONCE):
            chunk = packed[start : start + _ROWS_AT_ONCE]
            chunk |= np.arange(start, start + len(chunk))
        packed.sort()
        order = packed & ((1 << row_bits) - 1)
        packed >>= row_bits
        return cls(order, packed)

    @cached_property
    def starts(self) -> Int64Array:
        """First place of each group, int64 [groups]."""
        return run_starts(self.keys)

    @cached_property
    def sizes(self) -> Int64Array:
        """Rows of each group, int64 [groups]."""
        return _lengths(self.starts, len(self.keys))

    def parts(self, divisor: int, rows: int) -> Iterator[Groups]:
        """Cut into pieces of about `rows` rows, never between keys of equal `key // divisor`."""
        start = 0
        while start < len(self.keys):
            end = min(start + rows, len(self.keys))
            bound = (self.keys[end - 1] // divisor + 1) * divisor
            end = int(np.searchsorted(self.keys, bound))
            yield Groups(self.order[start:end], self.keys[start:end])
            start = end

    def crowded(self, limit: int) -> Groups:
        """Only the groups of more than `limit` rows."""
        kept = np.repeat(self.sizes > limit, self.sizes)
        return Groups(self.order[kept], self.keys[kept])


def run_starts(ordered: npt.NDArray[Any]) -> Int64Array:
    """First place of each run of equal values in an ordered array, int64 [runs]."""
    if not len(ordered):
        return np.zeros(0, dtype=np.int64)
    is_start = np.empty(len(ordered), dtype=bool)
    is_start[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=is_start[1:])
    return np.flatnonzero(is_start)


def run_lengths(ordered: npt.NDArray[Any]) -> Int64Array:
    """Rows of each run of equal values in an ordered array, int64 [runs]."""
    return _lengths(run_starts(ordered), len(ordered))


@dataclass(frozen=True)
class RunSummary:
    """What a report says about the runs of an ordered array."""

    count: int
    longest: int
    """Rows of the longest run; 0 where there is none."""


def summarize_runs(ordered: npt.NDArray[Any]) -> RunSummary:
    """Count the runs of equal values and find the longest, without an array of all of them."""
    count = longest = last = 0
    for start in range(0, len(ordered), _ROWS_AT_ONCE):
        block = ordered[max(0, start - 1) : start + _ROWS_AT_ONCE]
        begins = np.flatnonzero(block[1:] != block[:-1]) + max(1, start)
        if len(begins):
            within = int(np.diff(begins).max(initial=0))
            longest = max(longest, int(begins[0]) - last, within)
            last = int(begins[-1])
            count += len(begins)
    if not len(ordered):
        return RunSummary(0, 0)
    return RunSummary(count + 1, max(longest, len(ordered) - last))


def positions(ordered: npt.NDArray[Any]) -> Int64Array:
    """0-based position of each row in its run of equal values, int64 [n]."""
    starts = run_starts(ordered)
    position = np.arange(len(ordered))
    position -= np.repeat(starts, _lengths(starts, len(ordered)))
    return position


def order_by_hash(keys: Int64Array, hashes: UInt64Array) -> Int64Array:
    """Rows ordered by key, then by hash; keys and hashes [n]. int64 [n]."""
    key_bits, row_bits = int(keys.max(initial=0)).bit_length(), len(keys).bit_length()
    hash_bits = 63 - key_bits - row_bits
    if hash_bits < _LEAST_HASH_BITS:
        return np.lexsort((hashes, keys))
    packed = (hashes >> np.uint64(64 - hash_bits)).astype(np.int64)
    packed |= keys << hash_bits
    packed <<= row_bits
    packed |= np.arange(len(keys))
    packed.sort()
    order = packed & ((1 << row_bits) - 1)
    packed >>= row_bits
    tied = np.flatnonzero(packed[1:] == packed[:-1])
    if len(tied):
        # Equal in key and leading bits: such runs are sorted again, by the whole hash.
        places = np.union1d(tied, tied + 1)
        rows = order[places]
        order[places] = rows[np.lexsort((hashes[rows], keys[rows]))]
    return order


def compact(ordered: npt.NDArray[Any]) -> Int64Array:
    """Number the runs of an ordered array from 0, int64 [n]: smaller keys pack better."""
    lengths = run_lengths(ordered)
    return np.repeat(np.arange(len(lengths)), lengths)


def _lengths(starts: Int64Array, end: int) -> Int64Array:
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = end - starts[-1:]
    return lengths
