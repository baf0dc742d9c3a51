"""Fusing behaviour into item vectors: PPMI of co-occurrence, its SVD, and one PCA over both.

The alignment baseline that every learned loss must beat. Pure NumPy and SciPy; knows nothing about
datasets or files. The caller passes train sequences only: a co-occurrence taken from validation or
test would leak the transitions that the model is later judged on.

Source: `concat_pca` of CollisionGenRec. Its window of 3 and 256 components are our defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from forge_ray.data.ragged import Ragged

FloatArray: TypeAlias = npt.NDArray[np.float32]


def cooccurrence(sequences: Iterable[Ragged], num_items: int, *, window: int = 3) -> sp.csr_array:
    """Count how often two items stand at most `window` places apart in one sequence.

    Args:
        sequences: batches of train sequences, item indices in time order.
        num_items: catalogue size N.
        window: largest distance between the two places, >= 1.

    Returns:
        Symmetric float64 [N, N] counts without self pairs.
    """
    total = sp.csr_array((num_items, num_items), dtype=np.float64)
    for batch in sequences:
        row = np.repeat(np.arange(len(batch)), batch.lengths)
        items = batch.values.astype(np.int64)
        for lag in range(1, window + 1):
            same = (row[lag:] == row[:-lag]) & (items[lag:] != items[:-lag])
            first, second = items[:-lag][same], items[lag:][same]
            ones = np.ones(len(first))
            counts = sp.coo_array((ones, (first, second)), shape=(num_items, num_items))
            total = total + counts.tocsr()
    return sp.csr_array(total + total.T)


def behaviour_vectors(counts: sp.csr_array, dim: int) -> FloatArray:
    """Embed items so that items with the same neighbours are close.

    Args:
        counts: symmetric co-occurrence counts [N, N].
        dim: components to keep, at most N - 1.

    Returns:
        float32 [N, min(dim, N - 1)]: U·sqrt(S) of the positive pointwise mutual information, unit
        rows; zero rows for items without neighbours. Start vector and signs are fixed, so two runs
        give the same bytes.
    """
    num_items = counts.shape[0]
    ppmi = _ppmi(counts)
    width = min(dim, num_items - 1)
    if ppmi.nnz == 0 or width < 1:
        return np.zeros((num_items, max(width, 1)), dtype=np.float32)
    start = np.full(num_items, 1 / np.sqrt(num_items))
    left, strength, _ = svds(ppmi, k=width, v0=start, which="LM")
    order = np.argsort(-strength, kind="stable")
    left, strength = _fix_signs(left[:, order]), np.maximum(strength[order], 0)
    return _unit_rows((left * np.sqrt(strength)).astype(np.float32))


def fuse(vectors: FloatArray, behaviour: FloatArray, *, alpha: float) -> FloatArray:
    """Concatenate unit vectors with weighted behaviour and project back to the old width.

    Args:
        vectors: float32 [N, D].
        behaviour: float32 [N, d], unit rows.
        alpha: weight of behaviour; 0 returns `vectors` themselves.

    Returns:
        float32 [N, D]: the first D principal components, centred. Takes O((D + d)^2) beside the
        input.
    """
    if alpha == 0:
        return vectors
    both = np.concatenate([_unit_rows(vectors), np.float32(alpha) * behaviour], axis=1)
    both -= both.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = (both.T @ both).astype(np.float64)
    _, axes = np.linalg.eigh(covariance)
    components = _fix_signs(axes[:, ::-1][:, : vectors.shape[1]])
    return np.asarray(both @ components.astype(np.float32), dtype=np.float32)


def _ppmi(counts: sp.csr_array) -> sp.csr_array:
    """max(0, log(n_ab · T / (n_a · n_b))), zeros dropped."""
    pairs = counts.tocoo()
    degree = np.asarray(counts.sum(axis=1)).ravel()
    rows, columns = pairs.coords
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(pairs.data * degree.sum() / (degree[rows] * degree[columns]))
    keep = value > 0
    entries = (value[keep], (rows[keep], columns[keep]))
    return sp.coo_array(entries, shape=counts.shape).tocsr()


def _fix_signs(columns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Flip each column so that its largest entry is positive: a factor's sign is arbitrary."""
    largest = columns[np.abs(columns).argmax(axis=0), np.arange(columns.shape[1])]
    return columns * np.where(largest < 0, -1.0, 1.0)


def _unit_rows(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.float32(1e-12)), dtype=np.float32)
