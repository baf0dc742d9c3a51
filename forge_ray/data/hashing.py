"""Hashes that decide without a random state: the same on any machine, in any batch and any order.

One mixer for the whole package. Shards of users, held-out draws, ties between items and random
codes all start here, so that none of them depends on the position of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forge_ray.threads import map_threads

_GOLDEN = 0x9E3779B97F4A7C15
_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_CHUNK_ROWS = 1 << 16


def mix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit integers of any shape so that every input bit reaches every output bit.

    Source: the finaliser of splitmix64 (Steele et al. 2014), a permutation of the 64-bit integers.
    """
    mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The next output of splitmix64 for each state; unlike `mix64`, 0 does not give 0."""
    return mix64(state + np.uint64(_GOLDEN))


def unit_uniform(values: NDArray[np.int64], *, salt: int) -> NDArray[np.float64]:
    """Hash integers to uniform numbers in [0, 1); each salt gives an independent draw."""
    state = values.astype(np.uint64) + np.uint64((salt * _GOLDEN + 1) % 2**64)
    return (mix64(state) >> np.uint64(11)).astype(np.float64) / 2.0**53


def hash_bytes(ids: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """Hash fixed-width bytes ``[n]`` to uint64, whatever the zero padding.

    FNV-1a over the bytes, column by column, then `mix64` so that low bits are usable as a
    partition number.
    """
    letters = ids.view(np.uint8).reshape(len(ids), -1) if len(ids) else np.empty((0, 0), np.uint8)
    state = np.full(len(ids), _FNV_OFFSET, dtype=np.uint64)
    for column in letters.T:
        if column.all():
            state ^= column
            state *= _FNV_PRIME
        else:
            np.copyto(state, (state ^ column) * _FNV_PRIME, where=column != 0)
    return mix64(state)


def hash_ids(ids: NDArray[Any] | pa.Array | pa.ChunkedArray) -> NDArray[np.uint64]:
    """Hash ids ``[n]`` to uint64, equal for an integer and its decimal spelling.

    Args:
        ids: strings, UTF-8 bytes or integers. A chunk that fits the cache is spelled out at a time.
    """
    out = np.empty(len(ids), dtype=np.uint64)

    def hash_chunk(start: int) -> None:
        out[start : start + _CHUNK_ROWS] = hash_bytes(_spelled(ids[start : start + _CHUNK_ROWS]))

    map_threads(hash_chunk, range(0, len(ids), _CHUNK_ROWS))
    return out


def fixed_width(ids: pa.Array | pa.ChunkedArray) -> NDArray[np.bytes_]:
    """Strings without nulls ``[n]`` as UTF-8 bytes of one width, zero-padded, in byte order."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    texts = ids.cast(pa.large_binary())
    _, offsets_buffer, data = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    lengths = np.diff(offsets)
    width = max(1, int(lengths.max(initial=0)))
    packed = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data else np.empty(0, "u1")
    if (lengths == width).all():
        return packed.view(f"S{width}")
    letters = np.zeros((len(texts), width), dtype=np.uint8)
    letters[np.arange(width) < lengths[:, None]] = packed
    return letters.view(f"S{width}").reshape(-1)


def distinct_hashes(ids: NDArray[Any] | pa.Array | pa.ChunkedArray) -> NDArray[np.uint64]:
    """Hash distinct ids ``[n]`` to distinct uint64, so that they order rows without a tie.

    Two ids that share a hash (never seen; one catalogue in 10^5 of ten million) are told apart by
    their spelling: the later one takes the next free number.
    """
    hashes = hash_ids(ids)
    ordered = np.sort(hashes)
    repeats = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeats):
        _separate(hashes, np.flatnonzero(np.isin(hashes, repeats)), ids, set(ordered.tolist()))
    return hashes


def hashed_orders(
    hashes: NDArray[np.uint64], size: int, limit: int, *, seed: int
) -> NDArray[np.int64]:
    """Give each hash its own order of the numbers 0..size-1, independent of all other hashes.

    Args:
        hashes: one per row ``[m]``.
        size: how many numbers there are.
        limit: leading numbers of each order to return.
        seed: another seed gives other orders.

    Returns:
        int64 ``[m, min(limit, size)]``: distinct numbers in each row. The order walks the ring of
        numbers from a random start with a random stride that is coprime to `size`, so every number
        is equally likely at every place and no row costs more than what it returns.
    """
    rings = np.arange(size)
    strides = rings[np.gcd(rings, size) == 1] if size > 1 else np.ones(1, dtype=np.int64)
    salt = splitmix64(np.array([seed], dtype=np.int64).astype(np.uint64))
    first = splitmix64(hashes ^ salt)
    start = (first % np.uint64(size)).astype(np.int64)
    stride = strides[(splitmix64(first) % np.uint64(len(strides))).astype(np.int64)]
    return (start[:, None] + stride[:, None] * rings[:limit]) % size


def _spelled(ids: NDArray[Any] | pa.Array | pa.ChunkedArray) -> NDArray[np.bytes_]:
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind == "S":
            return np.ascontiguousarray(ids)
        if ids.dtype.kind in "iu":
            return ids.astype("S")
        ids = pa.array(ids.tolist() if ids.dtype.kind == "U" else ids)
    if not pa.types.is_string(ids.type) and not pa.types.is_large_string(ids.type):
        return np.asarray(ids.to_numpy(zero_copy_only=False)).astype("S")
    return fixed_width(ids)


def _separate(
    hashes: NDArray[np.uint64],
    rows: NDArray[np.int64],
    ids: NDArray[Any] | pa.Array | pa.ChunkedArray,
    taken: set[int],
) -> None:
    """Move all but the first spelling of each shared hash to the next number nobody has."""
    spelled = {row: str(ids[row]) for row in rows.tolist()}
    seen: set[int] = set()
    for row in sorted(spelled, key=lambda one: spelled[one]):
        value = int(hashes[row])
        if value in seen:
            while value in taken:
                value = (value + 1) % 2**64
            hashes[row] = value
            taken.add(value)
        seen.add(int(hashes[row]))
