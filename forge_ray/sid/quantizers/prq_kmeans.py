"""Projective residual k-means: directions on the sphere, each taken out of what is left.

A level names the centroid direction that a vector is closest to; what lies along it is removed and
the rest is brought back to unit length, so every level looks at vectors of the same size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import embedding_bag

from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import (
    Assignment,
    Quantizer,
    QuantizerConfig,
    Report,
    TrainingSet,
    ignore_report,
)
from forge_ray.sid.quantizers.kmeans import Clustering, means, sample_rows
from forge_ray.sid.quantizers.nearest import TILE_ROWS, nearest_codes

_NEIGHBOURS = 2
_SHORTEST = 1e-3
"""A residual below this length is rounding noise: it stays zero instead of getting unit length."""


@dataclass(kw_only=True)
class PrqKmeansConfig(QuantizerConfig):
    """Spherical k-means on projected residuals.

    Source: arXiv 2608.24207, known to us from a digest alone. The decoder is ours: the source only
    makes codes.
    """

    kind: Literal["prq_kmeans"] = "prq_kmeans"
    iterations: int = 25
    """Soft updates per level, after a start from sampled vectors."""
    sharpness: float = 15.0
    """A vector moves its two closest centroids with weights exp(sharpness * cosine)."""
    max_points_per_code: int = 256
    """Most vectors per code that a level is learned from (a random sample beyond it)."""

    def __post_init__(self) -> None:
        """Check counts and sharpness."""
        super().__post_init__()
        for name in ("iterations", "max_points_per_code"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"quantizer.{name} must be >= 1, got {getattr(self, name)}. Raise it."
                )
        if self.sharpness <= 0:
            raise ConfigError(f"quantizer.sharpness must be > 0, got {self.sharpness}. Raise it.")

    def build(self, input_dim: int, *, seed: int) -> PrqKmeans:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        return PrqKmeans(self, input_dim, seed=seed)


class PrqKmeans(Quantizer):
    """Directions choose the codes; codebooks are the best sums for those codes.

    Latents are unit vectors without the catalogue's mean direction. `codebooks` hold the mean of
    what the levels above left of the latents, so their sum approximates a latent; a latent times
    `scale` plus `mean` approximates a vector.
    """

    config: PrqKmeansConfig
    directions: list[torch.Tensor]
    """Unit centroids, float32 [K_l, D] per level."""
    common: torch.Tensor
    """Unit mean direction of the fitted vectors, float32 [D]."""
    mean: torch.Tensor
    scale: float
    num_fitted: int
    """Vectors of the last fit."""

    def __init__(self, config: PrqKmeansConfig, input_dim: int, *, seed: int) -> None:
        super().__init__(input_dim, config.codebook_sizes, seed=seed)
        self.config = config
        self.directions = []
        self.common = torch.zeros(input_dim)
        self.mean = torch.zeros(input_dim)
        self.scale = 1.0
        self.num_fitted = 0

    def fit(self, data: TrainingSet, *, report: Report = ignore_report) -> None:
        """Find directions level by level, then the codewords that sum to the latents.

        Args:
            data: only its vectors are read.
            report: called once per level with the mean squared rest of the unit latents.
        """
        self._check_training_set(data.vectors)
        self.num_fitted = len(data.vectors)
        points = torch.tensor(data.vectors, dtype=torch.float32).to(self.fit_device)
        self.common = unit(unit(points).mean(dim=0))
        latents = self._to_latent(points)
        residual, rest = latents, latents.clone()
        self.directions, self.codebooks = [], []
        for level, size in enumerate(self.codebook_sizes):
            centroids = self._cluster(residual, size, level)
            codes = closest(residual, centroids)
            self.directions.append(centroids)
            self.codebooks.append(means(rest, codes, size)[0])
            rest -= self.codebooks[-1][codes]
            residual = project_out(residual, centroids[codes])
            report(level, {"residual": float(rest.square().sum(dim=1).mean())})
        self._fit_way_back(points, latents - rest)

    def facts(self) -> dict[str, Any]:
        """How many vectors were fitted, and how many of them each level was learned from."""
        how = Clustering(max_points_per_code=self.config.max_points_per_code)
        return how.facts(self.num_fitted, self.codebook_sizes)

    def to(self, device: str | torch.device) -> PrqKmeans:
        """Move everything to a device and return self."""
        super().to(device)
        self.directions = [one.to(device) for one in self.directions]
        self.common, self.mean = self.common.to(device), self.mean.to(device)
        return self

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return codebooks, directions and the way back from latents as named arrays."""
        directions = {f"direction.{i}": one.cpu().numpy() for i, one in enumerate(self.directions)}
        own = {
            "common": self.common.cpu().numpy(),
            "mean": self.mean.cpu().numpy(),
            "scale": np.array([self.scale]),
        }
        return {**super().state_dict(), **directions, **own}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        arrays = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        self.directions = [arrays[f"direction.{level}"] for level in range(self.num_levels)]
        self.common, self.mean = arrays["common"], arrays["mean"]
        self.scale = float(arrays["scale"][0])

    def _to_latent(self, vectors: torch.Tensor) -> torch.Tensor:
        return project_out(unit(vectors), self.common)

    def _from_latent(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.scale + self.mean

    def _assign(self, latents: torch.Tensor) -> Assignment:
        residual = latents
        codes: list[torch.Tensor] = []
        for level, centroids in enumerate(self.directions):
            if level:
                residual = project_out(residual, self.directions[level - 1][codes[-1]])
            codes.append(closest(residual, centroids))
        return Assignment(torch.stack(codes, dim=1), residual)

    def _last_distances(self, chunk: torch.Tensor) -> torch.Tensor:
        # Between unit vectors 2 - 2 cos is the squared distance.
        last = self._assign(self._to_latent(chunk)).last_residual
        return torch.full((), 2.0, device=last.device) - 2.0 * (last @ self.directions[-1].T)

    def _fit_way_back(self, points: torch.Tensor, coded: torch.Tensor) -> None:
        """Least squares for points = scale * coded + mean."""
        centre, coded_centre = points.mean(dim=0), coded.mean(dim=0)
        coded = coded - coded_centre
        overlap = ((points - centre) * coded).sum(dtype=torch.float64)
        self.scale = float(overlap / coded.square().sum(dtype=torch.float64).clamp(min=1e-12))
        self.mean = centre - self.scale * coded_centre

    def _cluster(self, residual: torch.Tensor, size: int, level: int) -> torch.Tensor:
        rng = np.random.default_rng(self.seed + level)
        limit = size * self.config.max_points_per_code
        points = sample_rows(residual, limit, rng)
        rows = rng.choice(len(points), size=size, replace=False)
        centroids = points[torch.from_numpy(rows).to(points.device)]
        for _ in range(self.config.iterations):
            centroids = soft_update(points, centroids, sharpness=self.config.sharpness)
        return centroids


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [..., D] at unit length; those that are next to zero become zero."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-12, vectors / length.clamp(min=1e-12), 0.0)


def project_out(vectors: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Remove from unit vectors [n, D] what lies along unit directions, and restore their length.

    Args:
        vectors: float32 [n, D], unit or zero.
        directions: float32 [n, D] or [D], unit.

    Returns:
        float32 [n, D], orthogonal to the directions; zero where nothing was left.
    """
    along = (vectors * directions).sum(dim=1, keepdim=True)
    left = vectors - along * directions
    length = left.norm(dim=1, keepdim=True)
    return torch.where(length > _SHORTEST, left / length.clamp(min=_SHORTEST), 0.0)


def closest(vectors: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The centroid with the largest inner product, int64 [n]."""
    return nearest_codes(vectors, centroids, torch.zeros(len(centroids), device=vectors.device))


def soft_update(points: torch.Tensor, centroids: torch.Tensor, *, sharpness: float) -> torch.Tensor:
    """Move every centroid to the weighted mean direction of the points that count it among two.

    Args:
        points: float32 [n, D], unit or zero.
        centroids: float32 [K, D], unit.
        sharpness: a point weighs exp(sharpness * cosine).

    Returns:
        float32 [K, D], unit; a centroid that no point counts stays.
    """
    best, codes, rows = [], [], []
    for start in range(0, len(points), TILE_ROWS):
        cosines = points[start : start + TILE_ROWS] @ centroids.T
        for _ in range(_NEIGHBOURS):
            code = _largest(cosines)[:, None]
            codes.append(code)
            best.append(cosines.gather(1, code))
            cosines.scatter_(1, code, -2.0)
        rows.append(torch.arange(start, start + len(cosines)).repeat(_NEIGHBOURS))
    cosine, code = torch.cat(best)[:, 0], torch.cat(codes)[:, 0]
    order = code.argsort(stable=True)
    counts = torch.bincount(code, minlength=len(centroids))
    sums = embedding_bag(
        torch.cat(rows).to(points.device)[order],
        points,
        counts.cumsum(0) - counts,
        mode="sum",
        # The factor exp(-sharpness) that this leaves out is common to all weights.
        per_sample_weights=torch.exp(sharpness * (cosine[order] - 1.0)),
    )
    moved = unit(sums)
    return torch.where(moved.norm(dim=1, keepdim=True) > 0, moved, centroids)


def _largest(scores: torch.Tensor) -> torch.Tensor:
    if scores.device.type != "cpu":
        return scores.argmax(dim=1)
    # As in `nearest`: NumPy uses the vector unit for this, torch does not.
    return torch.from_numpy(scores.numpy().argmax(axis=1))
