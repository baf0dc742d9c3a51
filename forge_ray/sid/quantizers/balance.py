"""Codewords that share the points evenly, while a point's code still depends on the point alone.

Each codeword gets a price, and a point takes the codeword with the smallest squared distance plus
price: popular codewords become dear until all are equally wanted. The prices are the dual variables
of the balanced transport between points and codewords, so nothing but them is left to store.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from forge_ray.sid.quantizers.base import squared_distances
from forge_ray.sid.quantizers.kmeans import means, sample_rows, squared_norms
from forge_ray.sid.quantizers.nearest import nearest_codes

_MOVES = np.geomspace(0.3, 0.03, 20)
"""Widths of the soft assignment while codewords move, in mean squared residuals."""
_SETTLES = np.geomspace(0.3, 0.005, 60)
"""Widths while only prices change: the last ones decide how even the sizes get."""
_CHUNK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Balanced:
    """Codewords and what they cost."""

    codebook: torch.Tensor
    """float32 [K, d]."""
    prices: torch.Tensor
    """float32 [K], added to squared distances."""


def balance(
    points: torch.Tensor, codebook: torch.Tensor, *, max_points_per_code: int, seed: int
) -> Balanced:
    """Move codewords and price them until each is nearest, price included, to as many points.

    Source: balanced k-means as in OneRec and MiniOneRec, whose clusters hold N/K points, give or
    take one. Differs: those assign a whole catalogue at once; prices code any later vector as
    well, and hold the sizes to a few per cent on vectors like those of the fit.

    Args:
        points: float32 [n, d], n >= K.
        codebook: float32 [K, d] to start from, on the same device.
        max_points_per_code: bound on the points read, a random sample beyond it.
        seed: fixes the sample.

    Returns:
        Codewords that are the means of their points under the prices, and the prices.
    """
    rng = np.random.default_rng(seed)
    points = sample_rows(points, len(codebook) * max_points_per_code, rng)
    prices = torch.zeros(len(codebook), device=points.device)
    error = _error(points, codebook, prices)
    for width in _MOVES:
        prices = prices + _price_change(points, codebook, prices, error * float(width))
        codes = nearest_codes(points, codebook, squared_norms(codebook) + prices)
        centres, counts = means(points, codes, len(codebook))
        codebook = torch.where(counts[:, None] > 0, centres, codebook)
    error = _error(points, codebook, prices)
    for width in _SETTLES:
        prices = prices + _price_change(points, codebook, prices, error * float(width))
    return Balanced(codebook, prices - prices.mean())


def _error(points: torch.Tensor, codebook: torch.Tensor, prices: torch.Tensor) -> float:
    codes = nearest_codes(points, codebook, squared_norms(codebook) + prices)
    # Points that equal their codewords leave no error; any positive width does for them.
    return max(float((points - codebook[codes]).square().sum(dim=1).mean()), 1e-12)


def _price_change(
    points: torch.Tensor, codebook: torch.Tensor, prices: torch.Tensor, blur: float
) -> torch.Tensor:
    """One Sinkhorn update of the column side: dearer where soft demand exceeds its share."""
    size = len(codebook)
    demand = torch.zeros(size, device=points.device)
    for start in range(0, len(points), _CHUNK_ROWS):
        costs = squared_distances(points[start : start + _CHUNK_ROWS], codebook) + prices
        demand += torch.softmax(-costs / blur, dim=1).sum(dim=0)
    # A codeword that nobody wants must not fall by more than a few widths at once.
    return blur * torch.log((demand * size / len(points)).clamp(min=1e-3))
