"""Optimised product quantization: a learned rotation, then one small codebook per block.

The codes of one item are parallel, not coarse to fine: a prefix names no region of the space, so
prefix metrics say little here and generators should predict all codes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import (
    Assignment,
    Quantizer,
    Report,
    TrainingSet,
    ignore_report,
)
from forge_ray.sid.quantizers.kmeans import (
    Clustering,
    KMeansConfig,
    cluster,
    lloyd,
    means,
    sample_rows,
    squared_norms,
)
from forge_ray.sid.quantizers.nearest import nearest_codes


@dataclass(kw_only=True)
class OpqConfig(KMeansConfig):
    """Blocks of a rotated space; `levels` is their number, 16 to 64 in RPG."""

    kind: Literal["opq"] = "opq"
    rotations: int = 20
    """Updates of the rotation, each with one Lloyd iteration; 0 keeps the start: principal
    directions, dealt out so that all blocks have the same variance. faiss: 50."""

    def __post_init__(self) -> None:
        """Check the rotations."""
        super().__post_init__()
        check_rotations(self.rotations)

    def build(self, input_dim: int, *, seed: int) -> Opq:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        check_blocks(self.levels, input_dim)
        return Opq(self, input_dim, seed=seed)


@dataclass(frozen=True, eq=False)
class Rotated:
    """A rotation and the codewords of each block behind it."""

    mean: torch.Tensor
    """float32 [D], subtracted first."""
    rotation: torch.Tensor
    """float32 [D, D], orthogonal; rows times it are rotated."""
    words: list[torch.Tensor]
    """float32 [K_j, w_j] of block j; the widths sum to D."""

    def padded(self) -> list[torch.Tensor]:
        """Codewords in the whole rotated space, zero outside their block: float32 [K_j, D]."""
        blocks = block_slices(len(self.mean), len(self.words))
        books = []
        for block, words in zip(blocks, self.words, strict=True):
            book = torch.zeros(len(words), len(self.mean), device=words.device)
            book[:, block] = words
            books.append(book)
        return books


class Opq(Quantizer):
    """Product quantization behind a rotation; latents are the rotated, centred vectors."""

    config: OpqConfig
    mean: torch.Tensor
    rotation: torch.Tensor
    num_fitted: int
    """Vectors of the last fit."""

    def __init__(self, config: OpqConfig, input_dim: int, *, seed: int) -> None:
        super().__init__(input_dim, config.codebook_sizes, seed=seed)
        self.config = config
        self.mean = torch.zeros(input_dim)
        self.rotation = torch.eye(input_dim)
        self.num_fitted = 0

    def fit(self, data: TrainingSet, *, report: Report = ignore_report) -> None:
        """Learn rotation and codewords in turn.

        Args:
            data: only its vectors are read.
            report: called once per rotation, and at the end, with the mean squared residual.
        """
        self._check_training_set(data.vectors)
        self.num_fitted = len(data.vectors)
        points = torch.tensor(data.vectors, dtype=torch.float32).to(self.fit_device)
        config = self.config
        found = fit_opq(
            points,
            self.codebook_sizes,
            config.clustering,
            rotations=config.rotations,
            seed=self.seed,
            report=report,
        )
        self.mean, self.rotation = found.mean, found.rotation
        self.codebooks = found.padded()

    def facts(self) -> dict[str, Any]:
        """How many vectors were fitted, and how many of them the blocks were learned from."""
        return self.config.clustering.facts(self.num_fitted, [max(self.codebook_sizes)])

    def to(self, device: str | torch.device) -> Opq:
        """Move everything to a device and return self."""
        super().to(device)
        self.mean, self.rotation = self.mean.to(device), self.rotation.to(device)
        return self

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return codebooks, rotation and mean as named arrays."""
        own = {"mean": self.mean.cpu().numpy(), "rotation": self.rotation.cpu().numpy()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.mean = torch.from_numpy(np.array(state["mean"]))
        self.rotation = torch.from_numpy(np.array(state["rotation"]))

    def _to_latent(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors - self.mean) @ self.rotation

    def _from_latent(self, latents: torch.Tensor) -> torch.Tensor:
        return latents @ self.rotation.T + self.mean

    def _assign(self, latents: torch.Tensor) -> Assignment:
        # Blocks do not meet, so each level is a product over its own columns alone.
        last, codes = latents.clone(), []
        blocks = block_slices(self.input_dim, self.num_levels)
        for level, block in enumerate(blocks):
            words = self.codebooks[level][:, block]
            code = nearest_codes(latents[:, block], words, self._offsets(level))
            codes.append(code)
            if level < self.num_levels - 1:
                last[:, block] -= words[code]
        return Assignment(torch.stack(codes, dim=1), last)


def check_rotations(rotations: int) -> None:
    """Raise ConfigError for a negative number of rotation updates."""
    if rotations < 0:
        raise ConfigError(f"quantizer.rotations must be >= 0, got {rotations}. Raise it.")


def check_blocks(blocks: int, input_dim: int) -> None:
    """Raise ConfigError when some block would have no column."""
    if blocks > input_dim:
        raise ConfigError(
            f"quantizer blocks must be <= {input_dim}, the width of the vectors, got {blocks}. "
            "Use fewer."
        )


def block_slices(dim: int, blocks: int) -> list[slice]:
    """Cut `dim` columns into blocks whose widths differ by one at most, the wider ones first."""
    widths = [dim // blocks + (block < dim % blocks) for block in range(blocks)]
    ends = list(accumulate(widths))
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def fit_opq(
    points: torch.Tensor,
    sizes: Sequence[int],
    how: Clustering,
    *,
    rotations: int,
    seed: int,
    report: Report = ignore_report,
) -> Rotated:
    """Learn a rotation and block codewords that lose little of the points.

    Source: Ge et al. 2013, "Optimized Product Quantization": the parametric start and the
    alternation of codewords and rotation (an orthogonal Procrustes problem).

    Args:
        points: float32 [n, D].
        sizes: codewords per block, length m <= D.
        how: clustering of each block; its bound on points per code holds for all blocks together.
        rotations: updates of the rotation.
        seed: block j is clustered with `seed + j`.
        report: called with a step and the mean squared residual.

    Returns:
        The rotation and the codewords.
    """
    rng = np.random.default_rng(seed)
    points = sample_rows(points, how.num_points(len(points), max(sizes)), rng)
    mean = points.mean(dim=0)
    centred = points - mean
    blocks = block_slices(points.shape[1], len(sizes))
    rotation = _even_principal_directions(centred, blocks)
    rotated = centred @ rotation
    words = [
        cluster(rotated[:, block].contiguous(), size, how, seed=seed + level)
        for level, (block, size) in enumerate(zip(blocks, sizes, strict=True))
    ]
    for step in range(rotations):
        coded = _coded(rotated, blocks, words)
        report(step, {"residual": _mean_square(rotated - coded)})
        left, _, right = torch.linalg.svd((centred.T @ coded).double())
        rotation = (left @ right).float()
        rotated = centred @ rotation
        words = [_moved(rotated[:, block], book) for block, book in zip(blocks, words, strict=True)]
    if rotations:
        words = [
            lloyd(rotated[:, block].contiguous(), book, how.iterations)
            for block, book in zip(blocks, words, strict=True)
        ]
    report(rotations, {"residual": _mean_square(rotated - _coded(rotated, blocks, words))})
    return Rotated(mean, rotation, words)


def _even_principal_directions(centred: torch.Tensor, blocks: list[slice]) -> torch.Tensor:
    """Principal directions in the order that gives all blocks about the same product of variances.

    Each direction, widest first, goes to the block with room whose product is the smallest.
    """
    values, directions = torch.linalg.eigh((centred.T @ centred).double())
    log_variance = values.clamp(min=1e-12).log().cpu().numpy()
    # Shifted so that every direction adds: otherwise a narrow one would make its block emptier.
    gains = log_variance - log_variance.min() + 1.0
    rooms = [list(range(block.start, block.stop)) for block in blocks]
    totals = np.zeros(len(blocks))
    order = np.empty(len(values), dtype=np.int64)
    for source in range(len(values) - 1, -1, -1):
        free = np.array([bool(room) for room in rooms])
        target = int(np.where(free, totals, np.inf).argmin())
        order[rooms[target].pop(0)] = source
        totals[target] += gains[source]
    return directions[:, torch.from_numpy(order).to(directions.device)].float()


def _coded(rotated: torch.Tensor, blocks: list[slice], words: list[torch.Tensor]) -> torch.Tensor:
    """Replace every block by its nearest codeword."""
    pieces = [
        book[nearest_codes(rotated[:, block], book, squared_norms(book))]
        for block, book in zip(blocks, words, strict=True)
    ]
    return torch.cat(pieces, dim=1)


def _moved(part: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """One Lloyd iteration; codewords without points stay."""
    codes = nearest_codes(part, book, squared_norms(book))
    centres, counts = means(part, codes, len(book))
    return torch.where(counts[:, None] > 0, centres, book)


def _mean_square(residual: torch.Tensor) -> float:
    return float(residual.square().sum(dim=1).mean())
