"""Residual k-means: the quantizer without a network, deterministic and done in seconds.

Source: OpenOneRec and CollisionGenRec use the same residual k-means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from forge_ray.sid.quantizers.balance import balance
from forge_ray.sid.quantizers.base import (
    Quantizer,
    Report,
    TrainingSet,
    ignore_report,
)
from forge_ray.sid.quantizers.kmeans import (
    KMeansConfig,
    residual_kmeans,
)
from forge_ray.sid.quantizers.nearest import nearest_codes

__all__ = ["RqKmeans", "RqKmeansConfig", "residual_kmeans"]


@dataclass(kw_only=True)
class RqKmeansConfig(KMeansConfig):
    """Residual k-means in the space of the vectors."""

    kind: Literal["rq_kmeans"] = "rq_kmeans"
    balanced_last: bool = False
    """Let the codes of the last level hold equally many training vectors (MiniOneRec; OneSearch:
    balancing every level damages the meaning). Other levels keep every bit; see `balance`."""

    def build(self, input_dim: int, *, seed: int) -> RqKmeans:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        return RqKmeans(self, input_dim, seed=seed)


class RqKmeans(Quantizer):
    """K-means on the vectors, then on what is left of them, level by level."""

    config: RqKmeansConfig
    prices: torch.Tensor | None
    """float32 [K_L] added to the distances of the last level; None unless it is balanced."""
    num_fitted: int
    """Vectors of the last fit."""

    def __init__(self, config: RqKmeansConfig, input_dim: int, *, seed: int) -> None:
        super().__init__(input_dim, config.codebook_sizes, seed=seed)
        self.config = config
        self.prices = None
        self.num_fitted = 0

    def fit(self, data: TrainingSet, *, report: Report = ignore_report) -> None:
        """Cluster residuals level by level.

        Args:
            data: only its vectors are read.
            report: called once per level with the mean squared residual that is left.
        """
        self._check_training_set(data.vectors)
        self.num_fitted = len(data.vectors)
        config = self.config
        points = torch.tensor(data.vectors, dtype=torch.float32).to(self.fit_device)
        self.prices = None
        self.codebooks = residual_kmeans(
            points,
            self.codebook_sizes,
            iterations=config.iterations,
            seed=self.seed,
            init=config.init,
            max_points_per_code=config.max_points_per_code,
            report=report,
        )
        if config.balanced_last:
            self._balance_last(points, report)

    def facts(self) -> dict[str, Any]:
        """How many vectors were fitted, and how many of them each level clustered."""
        return self.config.clustering.facts(self.num_fitted, self.codebook_sizes)

    def to(self, device: str | torch.device) -> RqKmeans:
        """Move codebooks, prices and the work of a later `fit` to a device and return self."""
        super().to(device)
        self.prices = None if self.prices is None else self.prices.to(device)
        return self

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return codebooks, and prices where the last level is balanced, as named arrays."""
        prices = {} if self.prices is None else {"prices": self.prices.cpu().numpy()}
        return {**super().state_dict(), **prices}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.prices = torch.from_numpy(np.array(state["prices"])) if "prices" in state else None

    def _offsets(self, level: int) -> torch.Tensor:
        norms = super()._offsets(level)
        is_last = level % self.num_levels == self.num_levels - 1
        return norms if self.prices is None or not is_last else norms + self.prices

    def _balance_last(self, points: torch.Tensor, report: Report) -> None:
        residual = points
        for level, codebook in enumerate(self.codebooks[:-1]):
            residual = residual - codebook[nearest_codes(residual, codebook, self._offsets(level))]
        balanced = balance(
            residual,
            self.codebooks[-1],
            max_points_per_code=self.config.max_points_per_code,
            seed=self.seed,
        )
        self.codebooks[-1], self.prices = balanced.codebook, balanced.prices
        last = self.num_levels - 1
        codes = nearest_codes(residual, self.codebooks[-1], self._offsets(last))
        left = residual - self.codebooks[-1][codes]
        report(self.num_levels, {"residual": float(left.square().sum(dim=1).mean())})
