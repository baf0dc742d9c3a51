"""Residual k-means: the quantizer without a network, deterministic and done in seconds.

Source: OpenOneRec and CollisionGenRec use the same residual k-means; faiss does the clustering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import faiss
import numpy as np
import torch

from forge_ray.errors import ConfigError, TrainingError
from forge_ray.sid.quantizers.base import (
    CHUNK_ROWS,
    FloatArray,
    Quantizer,
    QuantizerConfig,
    Report,
    TrainingSet,
    ignore_report,
    squared_distances,
)


@dataclass(kw_only=True)
class RqKmeansConfig(QuantizerConfig):
    """Residual k-means in the space of the vectors."""

    kind: Literal["rq_kmeans"] = "rq_kmeans"
    iterations: int = 25
    """Lloyd iterations per level; the sources use 20 to 30."""

    def __post_init__(self) -> None:
        """Check the iteration count."""
        super().__post_init__()
        if self.iterations < 1:
            raise ConfigError(
                f"quantizer.iterations must be >= 1, got {self.iterations}. Raise it."
            )

    def build(self, input_dim: int, *, seed: int) -> RqKmeans:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        return RqKmeans(input_dim, self.codebook_sizes, seed=seed, iterations=self.iterations)


class RqKmeans(Quantizer):
    """K-means on the vectors, then on what is left of them, level by level."""

    iterations: int

    def __init__(
        self, input_dim: int, codebook_sizes: tuple[int, ...], *, seed: int, iterations: int
    ) -> None:
        super().__init__(input_dim, codebook_sizes, seed=seed)
        self.iterations = iterations

    def fit(
        self,
        data: TrainingSet,
        *,
        report: Report = ignore_report,
    ) -> None:
        """Cluster residuals level by level.

        Args:
            data: only its vectors are read.
            report: called once per level with the mean squared residual that is left.
        """
        vectors = data.vectors
        self._check_training_set(vectors)
        self.codebooks = residual_kmeans(
            vectors, self.codebook_sizes, iterations=self.iterations, seed=self.seed, report=report
        )


def residual_kmeans(
    points: FloatArray,
    sizes: Sequence[int],
    *,
    iterations: int,
    seed: int,
    report: Report = ignore_report,
) -> list[torch.Tensor]:
    """Cluster points, subtract the centroids, and cluster again, once per level.

    Args:
        points: float32 [n, d], n at least the largest size.
        sizes: centroids per level.
        iterations: Lloyd iterations per level.
        seed: level l draws its first centroids with `seed + l`.
        report: called with the level and the mean squared residual after it.

    Returns:
        One float32 [K_l, d] tensor per level.

    Raises:
        TrainingError: when a centroid is not finite.
    """
    residual = np.array(points, dtype=np.float32, order="C")
    codebooks = []
    for level, size in enumerate(sizes):
        codebook = torch.from_numpy(_kmeans(residual, size, iterations, seed + level))
        if not torch.isfinite(codebook).all():
            raise TrainingError(
                f"k-means of level {level} must stay finite, got NaN or infinite centroids. "
                "Check the vectors with `forge-ray data validate`."
            )
        _subtract_nearest(residual, codebook)
        codebooks.append(codebook)
        report(level, {"residual": float(np.square(residual).sum(axis=1).mean())})
    return codebooks


def _kmeans(points: FloatArray, size: int, iterations: int, seed: int) -> FloatArray:
    kmeans = faiss.Kmeans(
        points.shape[1],
        size,
        niter=iterations,
        seed=seed,
        # The caller has sampled already; faiss would silently sample again.
        max_points_per_centroid=len(points),
        min_points_per_centroid=1,
    )
    kmeans.train(points)
    return np.array(kmeans.centroids, dtype=np.float32).reshape(size, points.shape[1])


def _subtract_nearest(residual: FloatArray, codebook: torch.Tensor) -> None:
    for start in range(0, len(residual), CHUNK_ROWS):
        rows = torch.from_numpy(residual[start : start + CHUNK_ROWS])
        rows -= codebook[squared_distances(rows, codebook).argmin(dim=1)]
