"""What each further code adds: how well prefixes of a SID rebuild the vector, and whom they unite.

Pure functions of vectors and codes of a sample of items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from forge_ray.sid.metrics.quality import prefix_ids
from forge_ray.sid.metrics.similarity import code_cosines, explained_share
from forge_ray.sid.quantizers.base import Quantizer

FloatArray: TypeAlias = npt.NDArray[np.float32]
Integers: TypeAlias = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PrefixFigures:
    """One prefix depth, 0 (no code at all) to L."""

    depth: int
    r2: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² with x̂ decoded from the first `depth` codes; below 0 when they
    say less than the mean of the sample."""
    cosine: float
    """Mean cosine of x − x̄ and x̂ − x̄; 0 at depth 0."""
    cohesion: float
    """Mean cosine of two sampled items with equal first `depth` codes, over all such pairs; at
    depth 0 over all pairs. NaN without a pair."""


def prefix_figures(
    vectors: FloatArray, codes: Integers, quantizer: Quantizer
) -> list[PrefixFigures]:
    """Measure every depth of the quantizer's levels.

    Args:
        vectors: float32 [n, D] of sampled items, n >= 1.
        codes: their codes [n, L'], L' at least the quantizer's levels; further ones are ignored.
        quantizer: decodes prefixes.
    """
    depths = range(1, quantizer.num_levels + 1)
    prefixes = np.stack(prefix_ids(codes[:, : quantizer.num_levels]).ids, axis=1)
    shared = code_cosines(prefixes, vectors)
    mean = vectors.mean(axis=0)
    rows = [PrefixFigures(0, 0.0, 0.0, shared.any)]
    for depth, cohesion in zip(depths, shared.levels, strict=True):
        decoded = quantizer.decode(codes[:, :depth])
        cosine = (_unit(vectors - mean) * _unit(decoded - mean)).sum(axis=1).mean()
        rows.append(
            PrefixFigures(depth, explained_share(vectors, decoded), float(cosine), cohesion)
        )
    return rows


def group_cosine(vectors: FloatArray, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mean cosine of two different rows of each group, NaN where there are fewer than two.

    Args:
        vectors: float32 [n, D].
        groups: int64 [n] >= 0.

    Returns:
        float64 [G], G one more than the largest group.
    """
    sizes = np.bincount(groups)
    shape = (len(sizes), len(groups))
    onehot = sp.csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))), shape=shape)
    unit = _unit(vectors).astype(np.float64)
    own = onehot @ np.square(unit).sum(axis=1)
    pairs = sizes * (sizes - 1)
    total = np.square(np.asarray(onehot @ unit)).sum(axis=1) - own
    return np.where(pairs > 0, total / np.maximum(pairs, 1), np.nan)


def nearest_rows(targets: FloatArray, vectors: FloatArray) -> npt.NDArray[np.int64]:
    """Row of `vectors` [n, D] with the largest cosine to each target [m, D], int64 [m]."""
    return np.argmax(_unit(targets) @ _unit(vectors).T, axis=1).astype(np.int64)


def _unit(vectors: FloatArray) -> FloatArray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
