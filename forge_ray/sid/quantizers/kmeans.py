"""K-means behind one function: starts, Lloyd's iterations on either device, residual levels.

Points on the CPU are clustered by faiss, points on a GPU (and few points anywhere) by torch; both
repeat the same iteration and agree up to rounding. Knows points and centroids; nothing of SIDs or
files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
import torch

from forge_ray.errors import ConfigError, TrainingError
from forge_ray.sid.quantizers.base import (
    FloatArray,
    QuantizerConfig,
    Report,
    ignore_report,
    squared_distances,
)
from forge_ray.sid.quantizers.nearest import nearest_codes

Init = Literal["sample", "k-means++", "progressive"]

POINTS_PER_CODE = 256
"""Most points per centroid that a clustering reads; faiss has the same default."""

_STAGES, _STAGE_ITERATIONS = 20, 6
_PCA_ROWS = 65_536
_SPLIT = 1 / 1024
_FAISS_NUMBERS = 1 << 17
"""Floats in the points from which faiss 1.15 searches by blocked products; below, torch is three
times as fast at 1 to 10 columns."""


@dataclass(kw_only=True)
class KMeansConfig(QuantizerConfig):
    """What every quantizer that clusters needs to know; not a kind of its own."""

    iterations: int = 25
    """Lloyd iterations per clustering, after the start; the sources use 20 to 30."""
    init: Init = "sample"
    """Where Lloyd's iterations start. `sample`: random points. `k-means++`: points drawn by their
    squared distance to those already drawn. `progressive`: k-means in a growing number of principal
    directions, which finds better optima than the other two for two to three times the work."""
    max_points_per_code: int = POINTS_PER_CODE
    """Most vectors per code that a clustering reads (a random sample beyond it); faiss: 256."""

    def __post_init__(self) -> None:
        """Check the counts."""
        super().__post_init__()
        for name in ("iterations", "max_points_per_code"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"quantizer.{name} must be >= 1, got {getattr(self, name)}. Raise it."
                )

    @property
    def clustering(self) -> Clustering:
        """The part that `cluster` reads."""
        return Clustering(self.iterations, self.init, self.max_points_per_code)


@dataclass(frozen=True)
class Clustering:
    """How to cluster; the fields are those of `KMeansConfig`."""

    iterations: int = 25
    init: Init = "sample"
    max_points_per_code: int = POINTS_PER_CODE

    def num_points(self, available: int, size: int) -> int:
        """Points that a clustering into `size` codes reads."""
        return min(available, size * self.max_points_per_code)

    def facts(self, available: int, sizes: Sequence[int]) -> dict[str, Any]:
        """What to say of the sampling in a manifest."""
        return {
            "fit_vectors": available,
            "clustered_vectors": [self.num_points(available, size) for size in sizes],
        }


def cluster(points: torch.Tensor, size: int, how: Clustering, *, seed: int) -> torch.Tensor:
    """Find centroids of a set of points.

    Args:
        points: float32 [n, d] on any device, n >= size.
        size: number of centroids K.
        how: iterations, start and sampling.
        seed: fixes sample and start.

    Returns:
        float32 [K, d] on the same device.

    Raises:
        TrainingError: when a centroid is not finite.
    """
    rng = np.random.default_rng(seed)
    points = sample_rows(points, how.num_points(len(points), size), rng)
    centroids = _STARTS[how.init](points, size, rng)
    centroids = lloyd(points, centroids, how.iterations)
    if not torch.isfinite(centroids).all():
        raise TrainingError(
            "k-means must stay finite, got NaN or infinite centroids. "
            "Check the vectors with `forge-ray data validate`."
        )
    return centroids


def residual_kmeans(
    points: FloatArray | torch.Tensor,
    sizes: Sequence[int],
    *,
    iterations: int,
    seed: int,
    init: Init = "sample",
    max_points_per_code: int = POINTS_PER_CODE,
    report: Report = ignore_report,
) -> list[torch.Tensor]:
    """Cluster points, subtract the centroids, and cluster again, once per level.

    Args:
        points: float32 [n, d], n at least the largest size; a tensor's device does the work.
        sizes: centroids per level.
        iterations: Lloyd iterations per level.
        seed: level l draws its first centroids with `seed + l`.
        init: start of each level.
        max_points_per_code: bound on the points that a level reads.
        report: called with the level and the mean squared residual after it.

    Returns:
        One float32 [K_l, d] tensor per level.

    Raises:
        TrainingError: when a centroid is not finite.
    """
    residual = (
        torch.tensor(points, dtype=torch.float32)
        if isinstance(points, np.ndarray)
        else (points.clone())
    )
    how = Clustering(iterations, init, max_points_per_code)
    codebooks = []
    for level, size in enumerate(sizes):
        codebook = cluster(residual, size, how, seed=seed + level)
        residual -= codebook[nearest_codes(residual, codebook, squared_norms(codebook))]
        codebooks.append(codebook)
        report(level, {"residual": float(residual.square().sum(dim=1).mean())})
    return codebooks


def lloyd(points: torch.Tensor, centroids: torch.Tensor, iterations: int) -> torch.Tensor:
    """Repeat: give every point to its nearest centroid, move the centroids to their means.

    Args:
        points: float32 [n, d].
        centroids: float32 [K, d], K <= n, on the same device.
        iterations: repetitions.

    Returns:
        float32 [K, d].
    """
    if iterations == 0:
        return centroids
    suits_faiss = points.device.type == "cpu" and points.numel() >= _FAISS_NUMBERS
    return (lloyd_faiss if suits_faiss else lloyd_torch)(points, centroids, iterations)


def lloyd_torch(points: torch.Tensor, centroids: torch.Tensor, iterations: int) -> torch.Tensor:
    """The same as `lloyd`, on any device and bit for bit repeatable on each."""
    for _ in range(iterations):
        codes = nearest_codes(points, centroids, squared_norms(centroids))
        centroids = split_empty(*means(points, codes, len(centroids)))
    return centroids


def lloyd_faiss(points: torch.Tensor, centroids: torch.Tensor, iterations: int) -> torch.Tensor:
    """The same as `lloyd`, on the CPU."""
    size, dim = centroids.shape
    kmeans = faiss.Kmeans(
        dim,
        size,
        niter=iterations,
        # The caller has sampled already; faiss would sample again, or warn of few points.
        max_points_per_centroid=len(points),
        min_points_per_centroid=1,
    )
    kmeans.train(points.numpy(), init_centroids=np.ascontiguousarray(centroids.numpy()))
    return torch.from_numpy(np.array(kmeans.centroids, dtype=np.float32).reshape(size, dim))


def means(
    points: torch.Tensor, codes: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the points of each code.

    Args:
        points: float32 [n, d].
        codes: int64 [n] in [0, size).
        size: number of codes K.

    Returns:
        float32 [K, d] means, zero for a code without points, and int64 [K] counts.
    """
    counts = torch.bincount(codes, minlength=size)
    # Bags are summed one after the other; index_add_ on a GPU would add in any order.
    sums = torch.nn.functional.embedding_bag(
        codes.argsort(stable=True), points, counts.cumsum(0) - counts, mode="sum"
    )
    return sums / counts.clamp(min=1)[:, None], counts


def split_empty(centroids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Put every centroid without points beside one of the most popular, which moves the other way.

    Source: faiss, which splits clusters drawn by size; here the largest are taken in order.
    """
    empty = (counts == 0).nonzero()[:, 0]
    largest = counts.argsort(descending=True, stable=True)[: max(1, len(counts) - len(empty))]
    donor = largest[torch.arange(len(empty), device=counts.device) % len(largest)]
    centroids = centroids.clone()
    centroids[empty] = centroids[donor] * (1 + _SPLIT)
    centroids[donor] *= 1 - _SPLIT
    return centroids


def sample_rows(points: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Draw rows without replacement, in their own order; all of them when `count` is reached."""
    if count >= len(points):
        return points
    rows = np.sort(rng.choice(len(points), size=count, replace=False))
    return points[torch.from_numpy(rows).to(points.device)]


def squared_norms(codebook: torch.Tensor) -> torch.Tensor:
    """Squared lengths of codewords, float32 [K]."""
    return codebook.square().sum(dim=1)


def _start_sample(points: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    rows = rng.choice(len(points), size=size, replace=False)
    return points[torch.from_numpy(rows).to(points.device)]


def _start_kmeans_plus_plus(
    points: torch.Tensor, size: int, rng: np.random.Generator
) -> torch.Tensor:
    """Draw centroids with probability proportional to the squared distance to those drawn before.

    Source: Arthur and Vassilvitskii 2007. Differs in the order of work, not in the distribution:
    several candidates are drawn from old weights, and each is kept with the probability by which
    the centroids drawn since have lowered its weight (rejection sampling). All of them together
    cost one product with the points, as one Lloyd iteration does.
    """
    norms = squared_norms(points)
    chosen = torch.from_numpy(rng.integers(len(points), size=1)).to(points.device)
    weights = _lowered(np.full(len(points), np.inf), points, norms, chosen)
    while len(chosen) < size:
        total = weights.cumsum()
        # More candidates than a quarter of the centroids so far would mostly be rejected.
        count = min(max(1, len(chosen) // 4), size - len(chosen))
        draws = rng.random(count) * total[-1]
        rows = np.minimum(np.searchsorted(total, draws, side="right"), len(points) - 1)
        kept = _kept(points, rows, weights, rng.random(count))
        if total[-1] == 0:
            # Fewer distinct points than centroids: the rest are repetitions.
            kept = rng.integers(len(points), size=count)
        new = torch.from_numpy(kept).to(points.device)
        chosen = torch.cat([chosen, new])
        weights = _lowered(weights, points, norms, new)
        weights[kept] = 0.0
    return points[chosen]


def _kept(
    points: torch.Tensor,
    rows: np.ndarray[Any, np.dtype[np.int64]],
    weights: np.ndarray[Any, np.dtype[np.float64]],
    draws: np.ndarray[Any, np.dtype[np.float64]],
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The candidate rows that survive those kept before them; the loop is over centroids."""
    candidates = points[torch.from_numpy(rows).to(points.device)].double().cpu()
    apart = torch.cdist(candidates, candidates).square().numpy()
    before = weights[rows]
    now = before.copy()
    kept = []
    for i, row in enumerate(rows):
        if now[i] > 0 and draws[i] * before[i] < now[i]:
            kept.append(row)
            np.minimum(now, apart[i], out=now)
    return np.array(kept, dtype=np.int64)


def _lowered(
    weights: np.ndarray[Any, np.dtype[np.float64]],
    points: torch.Tensor,
    norms: torch.Tensor,
    new: torch.Tensor,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Squared distances to the nearest centroid once the rows `new` are centroids too."""
    if not len(new):
        return weights
    centroids = points[new]
    rows = 4096
    nearest = [
        (squared_distances(points[start : start + rows], centroids).amin(dim=1))
        for start in range(0, len(points), rows)
    ]
    squared = (torch.cat(nearest) + norms).clamp(min=0).double().cpu().numpy()
    return np.minimum(weights, squared)


def _start_progressive(points: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Run k-means in a few principal directions, then in more, each start from the last result.

    Source: progressive-dimension clustering, the default of faiss.ResidualQuantizer (10 stages of
    10 iterations). Differs: 19 stages of 6, the whole width is left to the caller's iterations,
    and a new direction starts at the means of the clusters, as one more iteration would.
    """
    dim = points.shape[1]
    mean = points.mean(dim=0)
    centred = sample_rows(points, _PCA_ROWS, rng) - mean
    rotation = torch.linalg.eigh((centred.T @ centred).double()).eigenvectors.flip(1).float()
    rotated = (points - mean) @ rotation
    widths = sorted({int(dim ** (stage / _STAGES) + 1e-6) for stage in range(1, _STAGES)})
    widths = [width for width in widths if width < dim] or [dim]
    centroids = _start_sample(rotated, size, rng)[:, : widths[0]].contiguous()
    for width, following in zip(widths, [*widths[1:], dim], strict=True):
        part = rotated[:, :width].contiguous()
        centroids = lloyd(part, centroids, _STAGE_ITERATIONS)
        codes = nearest_codes(part, centroids, squared_norms(centroids))
        centroids = split_empty(*means(rotated[:, :following].contiguous(), codes, size))
    return centroids @ rotation.T + mean


_STARTS: dict[Init, Callable[[torch.Tensor, int, np.random.Generator], torch.Tensor]] = {
    "sample": _start_sample,
    "k-means++": _start_kmeans_plus_plus,
    "progressive": _start_progressive,
}
