"""Finite scalar quantization: a code is a point of a small grid, and no codebook is learned.

A level projects what it is given to a few scalars, squashes each into a bounded range and rounds;
the digits, read in mixed radix, are the code. Knows the configuration and inference; `fsq_network`
holds grids, layers and training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import (
    Assignment,
    Quantizer,
    QuantizerConfig,
    Report,
    TrainingSet,
    ignore_report,
)
from forge_ray.sid.quantizers.fsq_network import FsqNetwork, Schedule, train
from forge_ray.sid.quantizers.kmeans import residual_kmeans
from forge_ray.sid.quantizers.nearest import nearest_codes

_MAX_SCALAR = 8
"""Most values of one scalar when a grid is chosen for a codebook size, as in the published ones."""


@dataclass(kw_only=True)
class FsqConfig(QuantizerConfig):
    """Grids, how levels divide the vector, and the training of the projections.

    Source: FSQ (arXiv 2309.15505); RecGPT (arXiv 2506.06270) for the chunks, the linear layers,
    the L1 loss, Adam, batch and epochs; QARM-V2 for `rq_last`.
    """

    kind: Literal["fsq"] = "fsq"
    variant: Literal["chunked", "residual", "rq_last"] = "chunked"
    """`chunked`: level l codes the l-th part of the vector, so prefixes have no coarse-to-fine
    order (RecGPT). `residual`: level l codes what the levels before it left. `rq_last`: residual
    k-means for all levels but the last, which is a grid (QARM-V2)."""
    scalars: list[int] | None = None
    """Values V of each scalar, the same for every grid, e.g. [8, 8, 8, 6, 5] for 15,360 codes
    (RecGPT); the codebook size is their product. By default chosen for `codebook_size` or `sizes`:
    the largest product that is not above it, e.g. [8, 8, 4] for 256."""
    hidden: list[int] = field(default_factory=lambda: [256])
    """Widths of hidden layers between input and scalars, mirrored behind the scalars. RecGPT has
    none; on amazon-beauty (chunked, 3 x 256) that uses 0.89 of the codes and explains 0.25 of the
    variance, this 1.00 and 0.35."""
    kmeans_iterations: int = 25
    """Lloyd iterations per k-means level of `rq_last`."""
    batch_size: int = 256
    epochs: int = 100
    """Passes over the vectors, at most `max_steps` in all."""
    max_steps: int = 2000
    """Bound on optimiser steps; the source has none."""
    lr: float = 2e-3
    """Rate of Adam, cosine decay to 0. RecGPT: 1e-4, constant, over far more steps."""

    def __post_init__(self) -> None:
        """Check the grid and the schedule."""
        if self.scalars is not None:
            if not self.scalars or min(self.scalars) < 2:
                raise ConfigError(
                    f"quantizer.scalars must be numbers >= 2, got {self.scalars}. "
                    "Use e.g. [8, 6, 5] for 240 codes."
                )
            if self.sizes is not None and self.variant != "rq_last":
                raise ConfigError(
                    f"quantizer.sizes must be null beside quantizer.scalars, got {self.sizes}. "
                    "Set one of the two."
                )
        super().__post_init__()
        for name in ("batch_size", "epochs", "max_steps", "kmeans_iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"quantizer.{name} must be >= 1, got {getattr(self, name)}. Raise it."
                )
        if self.lr <= 0:
            raise ConfigError(f"quantizer.lr must be > 0, got {self.lr}. Raise it.")
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"quantizer.hidden must be >= 1, got {self.hidden}. Raise them.")

    @property
    def grids(self) -> tuple[tuple[int, ...] | None, ...]:
        """The scalars of each level, length L; None for a level of k-means."""
        first = self.levels - 1 if self.variant == "rq_last" else 0
        asked = super().codebook_sizes
        fixed = None if self.scalars is None else tuple(self.scalars)
        return tuple(
            None if level < first else fixed or grid_for(asked[level])
            for level in range(self.levels)
        )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes available at each level, length L: the product of a grid's scalars."""
        asked = super().codebook_sizes
        return tuple(
            size if grid is None else math.prod(grid)
            for size, grid in zip(asked, self.grids, strict=True)
        )

    def build(self, input_dim: int, *, seed: int) -> Fsq:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        if self.variant == "chunked" and self.levels > input_dim:
            raise ConfigError(
                f"quantizer.levels must be <= {input_dim}, the width of the vectors, with chunks, "
                f"got {self.levels}. Use fewer levels."
            )
        return Fsq(self, input_dim, seed=seed)


def grid_for(size: int) -> tuple[int, ...]:
    """Choose the scalars of a grid with at most `size` codes, most values first.

    Takes as few scalars of up to 8 values as can reach the size, then the largest product, then
    the most even one: 256 = 8·8·4, 1024 = 8·8·4·4, 8192 = 8·8·8·4·4.

    Args:
        size: codes asked for, >= 2.

    Returns:
        Scalars of 3 to 8 values; (2,) for size 2, where zero is not centred.
    """
    if size <= _MAX_SCALAR:
        return (max(size, 2),)
    count = next(n for n in range(2, 64) if _MAX_SCALAR**n >= size)
    fitting = (
        grid
        for grid in combinations_with_replacement(range(3, _MAX_SCALAR + 1), count)
        if math.prod(grid) <= size
    )
    return max(fitting, key=lambda grid: (math.prod(grid), grid[0], grid))[::-1]


class Fsq(Quantizer):
    """Grids over chunks or residuals of standardised vectors."""

    config: FsqConfig
    network: FsqNetwork
    mean: torch.Tensor
    """float32 [D], subtracted from inputs."""
    scale: float
    """Centred inputs are divided by it. RecGPT feeds the vectors as they are."""

    def __init__(self, config: FsqConfig, input_dim: int, *, seed: int) -> None:
        super().__init__(input_dim, config.codebook_sizes, seed=seed)
        self.config = config
        self.mean = torch.zeros(input_dim)
        self.scale = 1.0
        grids = [grid for grid in config.grids if grid is not None]
        # Layers draw their weights from the global generator; the fork leaves it untouched.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = FsqNetwork(
                input_dim, grids, hidden=config.hidden, is_chunked=config.variant == "chunked"
            )

    def fit(self, data: TrainingSet, *, report: Report = ignore_report) -> None:
        """Train the projections; with `rq_last`, cluster first and train on what is left.

        Args:
            data: only its vectors are read.
            report: called with a step and its loss, about 50 times.

        Raises:
            ConfigError: when there are fewer vectors than codes.
            TrainingError: when the loss is not finite.
        """
        self._check_training_set(data.vectors)
        vectors = torch.from_numpy(np.array(data.vectors, dtype=np.float32)).to(self.mean.device)
        self.mean = vectors.mean(dim=0)
        self.scale = max(float((vectors - self.mean).square().mean().sqrt()), 1e-12)
        points = (vectors - self.mean) / self.scale
        clusters = self._cluster(points)
        for codebook in clusters:
            points -= codebook[nearest_codes(points, codebook, codebook.square().sum(dim=1))]
        config = self.config
        per_epoch = math.ceil(len(points) / config.batch_size)
        steps = min(config.max_steps, config.epochs * per_epoch)
        schedule = Schedule(config.batch_size, steps, config.lr)
        train(self.network, points, schedule, seed=self.seed, report=report)
        self.network.eval().requires_grad_(False)
        self.codebooks = clusters + [
            level.codebook(self.input_dim) for level in self.network.grids()
        ]

    def to(self, device: str | torch.device) -> Fsq:
        """Move network and codebooks to a device and return self."""
        super().to(device)
        self.network.to(device)
        self.mean = self.mean.to(device)
        return self

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return codebooks, projections and the standardisation as named arrays."""
        weights = {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}
        scaling = {"mean": self.mean.cpu().numpy(), "scale": np.array([self.scale])}
        return {**super().state_dict(), **weights, **scaling}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        names = self.network.state_dict()
        self.network.load_state_dict({k: torch.from_numpy(np.array(state[k])) for k in names})
        self.network.eval().requires_grad_(False)
        self.mean = torch.from_numpy(np.array(state["mean"]))
        self.scale = float(state["scale"][0])

    def _last_distances(self, chunk: torch.Tensor) -> torch.Tensor:
        """Distances of the last grid's points to the bounded scalars: what rounding minimises."""
        last = self.network.grids()[-1]
        assigned = self._assign(self._to_latent(chunk))
        distances = last.grid.distances(last.raw(assigned.last_residual))
        # The last bit of a distance must not contradict the rounding.
        least = distances.amin(dim=1, keepdim=True)
        below = torch.nextafter(least, torch.full_like(least, -torch.inf))
        return distances.scatter(1, assigned.codes[:, -1:], below)

    def _cluster(self, points: torch.Tensor) -> list[torch.Tensor]:
        sizes = [
            size
            for size, grid in zip(self.codebook_sizes, self.config.grids, strict=True)
            if grid is None
        ]
        if not sizes:
            return []
        return residual_kmeans(
            points, sizes, iterations=self.config.kmeans_iterations, seed=self.seed
        )

    def _to_latent(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors - self.mean) / self.scale

    def _from_latent(self, latents: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.network.decoder(latents)
        return decoded * self.scale + self.mean

    def _assign(self, latents: torch.Tensor) -> Assignment:
        residual, codes = latents, []
        levels = self.network.grids()
        num_clustered = self.num_levels - len(levels)
        for number, codebook in enumerate(self.codebooks):
            last = residual
            if number < num_clustered:
                code = nearest_codes(residual, codebook, self._offsets(number))
            else:
                level = levels[number - num_clustered]
                code = level.grid.codes(level.raw(residual))
            residual = residual - codebook[code]
            codes.append(code)
        return Assignment(torch.stack(codes, dim=1), last)
