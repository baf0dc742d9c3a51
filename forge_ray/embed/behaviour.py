"""Fusing behaviour into item vectors: PPMI of co-occurrence, its SVD, and one PCA over both.

The alignment baseline that every learned loss must beat. Pure numerics; knows nothing about
datasets or files. The caller passes counts of train sequences only: a co-occurrence taken from
validation or test would leak the transitions that the model is later judged on.

Source: `concat_pca` of CollisionGenRec. Its window of 3 and 256 components are our defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from forge_ray.errors import ConfigError

FloatArray: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]

FUSE_ROWS = 16_384
"""Items fused at a time."""
_LOG_GROWTH = 15.0
_MAX_DEGREE = 16
_MAX_ROUNDS = 16
_TOLERANCE = 1e-4


@dataclass(kw_only=True)
class BehaviourConfig:
    """Train co-occurrence fused into the vectors."""

    alpha: float = 0.0
    """Weight of behaviour; 0 for none, 0.3 to 0.5 in the source."""
    dim: int = 256
    """Components of the co-occurrence SVD, d; memory grows by 20·N bytes for each."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.alpha < 0:
            raise ConfigError(
                f"vectors.behaviour.alpha must be >= 0, got {self.alpha}. Use 0 for none."
            )
        if self.dim < 1:
            raise ConfigError(
                f"vectors.behaviour.dim must be >= 1, got {self.dim}. Use 256 as in the source."
            )


def behaviour_vectors(counts: sp.csr_array, dim: int) -> FloatArray:
    """Embed items so that items with the same neighbours are close.

    Args:
        counts: symmetric co-occurrence counts or scores [N, N].
        dim: components to keep.

    Returns:
        float32 [N, min(dim, N - 1)]: U·sqrt(S) of the positive pointwise mutual information, unit
        rows; zero rows for items without neighbours. Start and signs are fixed, so two runs give
        the same bytes. Takes 5 blocks of 4·N·(1.25·dim + 8) bytes beside two copies of the counts.
    """
    num_items = counts.shape[0]
    information = ppmi(counts)
    width = min(dim, num_items - 1)
    if information.nnz == 0 or width < 1:
        return np.zeros((num_items, max(width, 1)), dtype=np.float32)
    basis, strength = _singular_pairs(information.astype(np.float32), width)
    basis *= np.sqrt(strength).astype(np.float32) * _signs(basis)
    return _unit_rows(basis)


def fuse(vectors: FloatArray, behaviour: FloatArray, *, alpha: float) -> FloatArray:
    """Concatenate unit vectors with weighted behaviour and project back to the old width.

    Args:
        vectors: float32 [N, D].
        behaviour: float32 [N, d], unit rows.
        alpha: weight of behaviour; 0 returns `vectors` themselves.

    Returns:
        float32 [N, D]: the first D principal components, centred. Takes the output and
        O((D + d)^2) beside the input; rows are concatenated `FUSE_ROWS` at a time.
    """
    if alpha == 0:
        return vectors
    num_items, dim = vectors.shape
    width = dim + behaviour.shape[1]
    total, moments = np.zeros(width), np.zeros((width, width))
    blocks = [slice(at, at + FUSE_ROWS) for at in range(0, num_items, FUSE_ROWS)]
    for rows in blocks:
        both = _side_by_side(vectors[rows], behaviour[rows], alpha).astype(np.float64)
        total += both.sum(axis=0)
        moments += both.T @ both
    mean = total / num_items
    _, axes = np.linalg.eigh(moments - num_items * np.outer(mean, mean))
    largest_first = axes[:, ::-1][:, :dim]
    components = (largest_first * _signs(largest_first)).astype(np.float32)
    out = np.empty_like(vectors)
    for rows in blocks:
        both = _side_by_side(vectors[rows], behaviour[rows], alpha) - mean.astype(np.float32)
        out[rows] = both @ components
    return out


def ppmi(counts: sp.csr_array) -> sp.csr_array:
    """Positive pointwise mutual information, max(0, log(n_ab · T / (n_a · n_b))).

    Args:
        counts: symmetric non-negative [N, N]; n_a are its row sums and T the sum of all.

    Returns:
        float64 [N, N] of the same order of memory; zeros are not stored.
    """
    degree = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(counts.data / degree[rows] * (degree.sum() / degree[counts.indices]))
    keep = value > 0
    starts = np.concatenate(([0], np.cumsum(keep)))[counts.indptr]
    entries = (value[keep], counts.indices[keep], starts.astype(counts.indptr.dtype))
    return sp.csr_array(entries, shape=counts.shape)


def _singular_pairs(matrix: sp.csr_array, count: int) -> tuple[FloatArray, Float64Array]:
    """The largest singular values of a symmetric matrix and their left vectors [N, count].

    Subspace iteration whose filter is the Chebyshev polynomial that stays within ±1 for everything
    below the block's own smallest singular value: several times faster than ARPACK where values
    fall slowly, as those of PPMI do.
    """
    num_items = matrix.shape[0]
    width = min(count + max(count // 4, 8), num_items)
    start = np.random.default_rng(0).standard_normal((num_items, width), dtype=np.float32)
    basis = _orthonormal(matrix @ start)
    before = np.zeros(count)
    for _ in range(_MAX_ROUNDS):
        image = matrix @ basis
        squares, rotation = np.linalg.eigh((image.T @ image).astype(np.float64))
        found = np.sqrt(np.maximum(squares[::-1], 0))
        moved = np.abs(found[:count] - before).max()
        before = found[:count]
        if width == num_items or moved <= _TOLERANCE * found[0]:
            break
        basis = _orthonormal(_filtered(matrix, basis, image, found))
    return basis @ rotation[:, ::-1][:, :count].astype(np.float32), before


def _filtered(
    matrix: sp.csr_array, basis: FloatArray, image: FloatArray, values: Float64Array
) -> FloatArray:
    """T_n(M / cutoff) · basis by the three-term recurrence."""
    cutoff = max(values[-1], 1e-3 * values[0])
    # T_n grows like cosh(n · acosh(ratio)); much beyond 1e6, float32 loses the smaller values.
    degree = int(np.clip(_LOG_GROWTH / max(np.arccosh(values[0] / cutoff), 1e-3), 2, _MAX_DEGREE))
    last, current = basis, image / np.float32(cutoff)
    for _ in range(degree - 1):
        following = matrix @ current
        following *= np.float32(2 / cutoff)
        following -= last
        last, current = current, following
    return current


def _orthonormal(columns: FloatArray) -> FloatArray:
    # The QR of torch is five times faster than NumPy's on tall blocks.
    basis: FloatArray = torch.linalg.qr(torch.from_numpy(columns)).Q.numpy()
    return basis


def _side_by_side(vectors: FloatArray, behaviour: FloatArray, alpha: float) -> FloatArray:
    return np.concatenate([_unit_rows(vectors), np.float32(alpha) * behaviour], axis=1)


def _signs(columns: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """±1 per column that makes its largest entry positive: a factor's sign is arbitrary."""
    largest = columns[np.abs(columns).argmax(axis=0), np.arange(columns.shape[1])]
    return np.where(largest < 0, np.float32(-1), np.float32(1))


def _unit_rows(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.float32(1e-12)), dtype=np.float32)
