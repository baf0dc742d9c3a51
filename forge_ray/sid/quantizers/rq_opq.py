"""Residual levels for the coarse meaning, then product codes for what is left of it.

Source: OneSearch codes items as 3 residual levels and 2 blocks of OPQ on the last residual. It does
not compare them with residual k-means at the same number of codes; do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import Quantizer, Report, TrainingSet, ignore_report
from forge_ray.sid.quantizers.kmeans import KMeansConfig, residual_kmeans, squared_norms
from forge_ray.sid.quantizers.nearest import nearest_codes
from forge_ray.sid.quantizers.opq import Rotated, check_blocks, check_rotations, fit_opq


@dataclass(kw_only=True)
class RqOpqConfig(KMeansConfig):
    """Residual k-means, with product quantization in its last levels."""

    kind: Literal["rq_opq"] = "rq_opq"
    levels: int = 5
    """Codes per SID, the product codes among them; 5 in OneSearch."""
    blocks: int = 2
    """Last levels that are product codes; 2 in OneSearch."""
    rotations: int = 20
    """Updates of the rotation; see `OpqConfig`."""

    def __post_init__(self) -> None:
        """Check that both parts have levels."""
        super().__post_init__()
        check_rotations(self.rotations)
        if not 1 <= self.blocks < self.levels:
            raise ConfigError(
                f"quantizer.blocks must be in 1..{self.levels - 1} (quantizer.levels - 1), got "
                f"{self.blocks}. Change one of the two."
            )

    def build(self, input_dim: int, *, seed: int) -> RqOpq:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        check_blocks(self.blocks, input_dim)
        return RqOpq(self, input_dim, seed=seed)


class RqOpq(Quantizer):
    """Codebooks that are all of full width, so encoding is that of every residual quantizer.

    A product codeword turned back into the input space differs from the others of its block only
    inside that block's directions. Taking the nearest one of the whole space is therefore taking
    the nearest of the block, and the sum of all codewords is the reconstruction.
    """

    config: RqOpqConfig
    num_fitted: int
    """Vectors of the last fit."""

    def __init__(self, config: RqOpqConfig, input_dim: int, *, seed: int) -> None:
        super().__init__(input_dim, config.codebook_sizes, seed=seed)
        self.config = config
        self.num_fitted = 0

    def fit(self, data: TrainingSet, *, report: Report = ignore_report) -> None:
        """Cluster level by level, then learn the product codes of the last residual.

        Args:
            data: only its vectors are read.
            report: called with a step and the mean squared residual that is left.
        """
        self._check_training_set(data.vectors)
        self.num_fitted = len(data.vectors)
        config = self.config
        first = config.levels - config.blocks
        residual = torch.tensor(data.vectors, dtype=torch.float32).to(self.fit_device)
        books = residual_kmeans(
            residual,
            self.codebook_sizes[:first],
            iterations=config.iterations,
            seed=self.seed,
            init=config.init,
            max_points_per_code=config.max_points_per_code,
            report=report,
        )
        for book in books:
            residual = residual - book[nearest_codes(residual, book, squared_norms(book))]
        found = fit_opq(
            residual,
            self.codebook_sizes[first:],
            config.clustering,
            rotations=config.rotations,
            seed=self.seed + first,
            report=lambda step, metrics: report(first + step, metrics),
        )
        self.codebooks = books + _full_width(found)

    def facts(self) -> dict[str, Any]:
        """How many vectors were fitted, and how many of them each part clustered."""
        first = self.config.levels - self.config.blocks
        sizes = [*self.codebook_sizes[:first], max(self.codebook_sizes[first:])]
        return self.config.clustering.facts(self.num_fitted, sizes)


def _full_width(found: Rotated) -> list[torch.Tensor]:
    """Block codewords in the input space, the mean with the first block."""
    books = [book @ found.rotation.T for book in found.padded()]
    books[0] = books[0] + found.mean
    return books
