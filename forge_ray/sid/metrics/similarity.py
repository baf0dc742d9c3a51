"""Whether codes mean similarity: what they keep of the vectors, and whether prefixes order items.

Pure NumPy and SciPy over a sample of items. Knows codes and vectors; knows nothing about behaviour,
so a table may do well here and still say little about what users do next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from forge_ray.sid.metrics.quality import prefix_ids

Integers = npt.NDArray[np.integer[Any]]
Vectors = npt.NDArray[np.floating[Any]]

_ROUNDS = 20
"""Draws of triplets before giving up: each keeps nearly all of a table with any structure."""
_BLOCK = 1 << 14
"""Triplets whose vectors are compared at a time."""


def explained_share(vectors: Vectors, restored: Vectors) -> float:
    """Reconstruction R² = 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖².

    Args:
        vectors: what was coded [n, D].
        restored: what the codes decode to [n, D].

    Returns:
        1 for lossless codes, 0 for codes worth no more than the mean, NaN when all x are equal.
    """
    lost = float(np.square(vectors - restored, dtype=np.float64).sum())
    spread = float(np.square(vectors - vectors.mean(axis=0, dtype=np.float64)).sum())
    return 1.0 - lost / spread if spread > 0 else float("nan")


@dataclass(frozen=True)
class CodeCosines:
    """Mean cosines between different items."""

    levels: tuple[float, ...]
    """S(l): of two items with the same code at level l; NaN where no two items share one."""
    any: float
    """Of any two items."""


def code_cosines(codes: Integers, vectors: Vectors) -> CodeCosines:
    """Measure S(l) = E[cos | same code at level l] over all pairs, exactly.

    `Σ_{i≠j} u_i·u_j = ‖Σ u_i‖² − Σ ‖u_i‖²` inside each code, so no pair is ever formed. O(n·D·L).

    Args:
        codes: integer codes [n, L].
        vectors: item vectors [n, D].
    """
    unit = _unit(vectors)
    norms = np.square(unit).sum(axis=1)
    levels = tuple(_mean_cosine(column, unit, norms) for column in codes.T)
    everyone = np.zeros(len(codes), dtype=np.int64)
    return CodeCosines(levels, _mean_cosine(everyone, unit, norms))


def _mean_cosine(
    column: Integers, unit: npt.NDArray[np.float64], norms: npt.NDArray[np.float64]
) -> float:
    _, groups, counts = np.unique(column, return_inverse=True, return_counts=True)
    num_pairs = int((counts * (counts - 1)).sum())
    if num_pairs == 0:
        return float("nan")
    shape = (len(counts), len(column))
    onehot = sp.csr_array((np.ones(len(column)), (groups, np.arange(len(column)))), shape=shape)
    sums = np.asarray(onehot @ unit)
    return float((np.square(sums).sum() - norms.sum()) / num_pairs)


@dataclass(frozen=True)
class OrderAgreement:
    """Result of `order_agreement`."""

    agreement: float
    """P(cos_ij > cos_ik | prefix of i, j longer than of i, k); equal cosines count half; NaN when
    no triplet has different prefixes."""
    standard_error: float
    """Of `agreement`, over triplets."""
    num_triplets: int
    """Triplets compared."""


def order_agreement(
    codes: Integers, vectors: Vectors, *, triplets: int = 20_000, seed: int = 0
) -> OrderAgreement:
    """Measure whether the item with the longer common prefix is the more similar one.

    Triplets (i, j, k) of different items are uniform among those with LCP(i, j) > LCP(i, k). Most
    random triplets share nothing, so j is drawn from i's first-level bucket and i in proportion to
    the partners it has there; triplets that fail the condition are then rejected.

    Args:
        codes: integer codes [n, L].
        vectors: item vectors [n, D].
        triplets: how many to compare; the standard error is about 0.5 / √triplets.
        seed: fixes the draw.
    """
    found = _draw_triplets(codes, triplets, np.random.default_rng(seed))
    if len(found) == 0:
        return OrderAgreement(float("nan"), float("nan"), 0)
    unit = _unit(vectors)
    wins = np.concatenate(
        [_wins(unit, found[start : start + _BLOCK]) for start in range(0, len(found), _BLOCK)]
    )
    return OrderAgreement(float(wins.mean()), float(wins.std() / np.sqrt(len(wins))), len(wins))


def _wins(
    unit: npt.NDArray[np.float64], triplets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    anchor, near, far = unit[triplets].transpose(1, 0, 2)
    difference = np.einsum("td,td->t", anchor, near - far)
    return np.heaviside(difference, 0.5)


def _draw_triplets(codes: Integers, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Up to `count` triplets (i, j, k) [t, 3] with LCP(i, j) > LCP(i, k)."""
    first = prefix_ids(codes[:, :1]).ids[0]
    order = np.argsort(first, kind="stable")
    sizes = np.bincount(first)
    starts = np.cumsum(sizes) - sizes
    partners = (sizes - 1)[first]
    cumulative = np.cumsum(partners)
    kept: list[npt.NDArray[np.int64]] = []
    if cumulative[-1] == 0 or len(codes) < 3:
        return np.empty((0, 3), dtype=np.int64)
    for _ in range(_ROUNDS):
        missing = count - sum(len(part) for part in kept)
        if missing <= 0:
            break
        draws = missing + missing // 8 + 16
        i = np.searchsorted(cumulative, rng.integers(0, cumulative[-1], draws), side="right")
        j = order[starts[first[i]] + rng.integers(0, sizes[first[i]])]
        k = rng.integers(0, len(codes), draws)
        is_good = (i != j) & (i != k) & (j != k)
        is_good &= common_prefix(codes[i], codes[j]) > common_prefix(codes[i], codes[k])
        kept.append(np.stack([i, j, k], axis=1)[is_good])
    return np.concatenate(kept)[:count]


def common_prefix(first: Integers, second: Integers) -> npt.NDArray[np.int64]:
    """Length of the common prefix of two SIDs, row by row.

    Args:
        first: integer codes [n, L].
        second: integer codes [n, L].

    Returns:
        int64 [n], 0..L.
    """
    return np.cumprod(first == second, axis=1, dtype=np.int64).sum(axis=1)


def _unit(vectors: Vectors) -> npt.NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.maximum(norms, np.finfo(np.float64).tiny))
