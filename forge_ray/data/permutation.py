"""A random order of 0..n-1 that is computed and not stored: any part of it, on any machine.

Knows integers only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forge_ray.data.hashing import mix64

_ROUNDS = 6
_U64 = np.uint64


def permuted(
    positions: NDArray[np.integer], size: int, *, key: tuple[int, ...]
) -> NDArray[np.int64]:
    """Look up places of a permutation of `0..size-1`.

    A Feistel network over the next power of four, walked until it falls below `size`: one to one,
    and constant memory however large `size` is.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), cycle walking.

    Args:
        positions: int [m], each in 0..size-1.
        size: length of the permutation.
        key: numbers that pick the permutation, e.g. seed and epoch.

    Returns:
        int64 [m]: the entries at those places.
    """
    half = _U64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    keys = np.random.default_rng(key).integers(0, 2**63, size=_ROUNDS).astype(_U64)
    values = positions.astype(_U64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _rounds(values[outside], half, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _rounds(values: NDArray[_U64], half: _U64, keys: NDArray[_U64]) -> NDArray[_U64]:
    mask = (_U64(1) << half) - _U64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mix64(right + key) & mask)
    return (left << half) | right
