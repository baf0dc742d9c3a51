"""Item ids as fixed-width bytes, and their dense index.

Indices follow the sorted ids and not the order of files, so that they are the same on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from forge_ray.data.hashing import fixed_width, hash_bytes

UNKNOWN = -1
DROPPED = -2
_ROWS_AT_ONCE = 1 << 18


class ItemIndex:
    """Finds the dense index of item ids.

    Holds the ids as fixed-width UTF-8 bytes, N times the longest id, and 8 to 12 bytes an item to
    find them by; Ray workers on a machine share one copy.
    """

    ids: NDArray[np.bytes_]
    """``[N]`` sorted; index i is the item with the i-th id."""

    dropped: NDArray[np.bytes_]
    """Sorted ids that were left out on request, with all that refers to them."""

    def __init__(self, ids: NDArray[np.bytes_], dropped: NDArray[np.bytes_] | None = None) -> None:
        self.ids = ids
        self.dropped = np.empty(0, dtype="S1") if dropped is None else dropped
        self._buckets, self._dropped_buckets = _Buckets(self.ids), _Buckets(self.dropped)

    def __len__(self) -> int:
        return len(self.ids)

    def lookup(self, ids: pa.Array) -> NDArray[np.int32]:
        """Return the index of each id ``[n]`` int32; `UNKNOWN` or `DROPPED` where there is none.

        Args:
            ids: strings, possibly null. Distinct ids are searched once.
        """
        encoded = ids.dictionary_encode()
        indices = pc.fill_null(encoded.indices, len(encoded.dictionary))
        wanted = to_bytes(encoded.dictionary)
        hashes = hash_bytes(wanted)
        found = np.full(len(wanted) + 1, UNKNOWN, dtype=np.int32)
        found[:-1][self._dropped_buckets.find(self.dropped, wanted, hashes) >= 0] = DROPPED
        places = self._buckets.find(self.ids, wanted, hashes)
        found[:-1][places >= 0] = places[places >= 0]
        return np.asarray(found[indices.to_numpy(zero_copy_only=False)])


class _Buckets:
    """Rows of an array of distinct ids by the leading bits of the ids' hashes.

    As many buckets as rows, rounded up to a power of two: a search looks at about one row whatever
    the number of ids, where a binary search misses the cache more often the more there are.
    """

    def __init__(self, ids: NDArray[np.bytes_]) -> None:
        bits = max(1, len(ids).bit_length())
        self._shift = np.uint64(64 - bits)
        bucket = self._bucket(hash_bytes(ids))
        self._rows = np.argsort(bucket).astype(np.int32)
        self._ends = np.cumsum(np.bincount(bucket, minlength=2**bits), dtype=np.int32)

    def find(
        self, ids: NDArray[np.bytes_], wanted: NDArray[np.bytes_], hashes: NDArray[np.uint64]
    ) -> NDArray[np.int32]:
        """Return the row of each wanted id ``[n]``, -1 where there is none.

        Args:
            ids: those that this was made of.
            wanted: ``[n]``.
            hashes: of the wanted ids ``[n]``.
        """
        found = np.full(len(wanted), -1, dtype=np.int32)
        bucket = self._bucket(hashes)
        left = self._ends[bucket]
        first = np.where(bucket > 0, self._ends[bucket - 1], 0)
        open_ = np.flatnonzero(left > first)
        while len(open_):
            left[open_] -= 1
            row = self._rows[left[open_]]
            is_same = ids[row] == wanted[open_]
            found[open_[is_same]] = row[is_same]
            open_ = open_[~is_same & (left[open_] > first[open_])]
        return found

    def _bucket(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        return (hashes >> self._shift).astype(np.int32)


def distinct(parts: Iterable[pa.Array]) -> pa.Array:
    """Return the ids of all parts once each, in the order of their first places.

    Parts wait until they are as many rows as the distinct ids known: each row is hashed a few times
    whatever the number of parts, and no more than twice the result is held.

    Args:
        parts: strings without nulls.

    Returns:
        Large strings, so that they may be more than 2 GiB.
    """
    found, waiting, rows = pa.array([], pa.large_string()), [], 0
    for ids in parts:
        waiting.append(ids.cast(pa.large_string()))
        rows += len(ids)
        if rows >= max(len(found), _ROWS_AT_ONCE):
            found, waiting, rows = pa.chunked_array([found, *waiting]).unique(), [], 0
    return pa.chunked_array([found, *waiting]).unique()


def to_bytes(ids: pa.Array) -> NDArray[np.bytes_]:
    """Return strings without nulls as fixed-width UTF-8 bytes; byte order is code-point order."""
    return fixed_width(ids) if len(ids) else np.empty(0, dtype="S1")


def to_strings(ids: NDArray[np.bytes_]) -> pa.Array:
    """Undo `to_bytes`."""
    lengths = np.char.str_len(ids)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    letters = np.ascontiguousarray(ids).view(np.uint8).reshape(len(ids), ids.dtype.itemsize)
    packed = letters[np.arange(letters.shape[1]) < lengths[:, None]]
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(packed)]
    return pa.Array.from_buffers(pa.large_string(), len(ids), buffers).cast(pa.string())
