"""Grids of bounded scalars, the layers around them, and their training.

Knows tensors only: neither configuration nor files. B rows, D width, n scalars of a grid, K = the
number of its points.
Source: FSQ (arXiv 2309.15505), section 3; RecGPT (arXiv 2506.06270) for the layers and the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from forge_ray.errors import TrainingError
from forge_ray.sid.quantizers.base import Report

_EPS = 1e-3
_REPORTS = 50
"""Points of the loss curve, whatever the number of steps."""
_START_ROWS = 8192
_RIDGE = 1e-3
"""Of the rows; keeps the first least squares solvable when scalars are constant."""


class Grid(nn.Module):
    """The points that a few bounded scalars can take.

    `half = (V − 1)(1 + ε)/2`; an even V is shifted by ½ so that V values fit, and the input so that
    0 stays 0; then rounding with straight-through gradient. Values are divided by V//2: they lie in
    [-1, 1].
    """

    reach: torch.Tensor
    offset: torch.Tensor
    shift: torch.Tensor
    unit: torch.Tensor
    radix: torch.Tensor
    basis: torch.Tensor

    def __init__(self, scalars: Sequence[int]) -> None:
        super().__init__()
        radix = torch.tensor(list(scalars), dtype=torch.int64)
        half = (radix - 1).double() * (1 + _EPS) / 2
        offset = torch.where(radix % 2 == 0, 0.5, 0.0).double()
        constants = {
            "reach": half.float(),
            "offset": offset.float(),
            "shift": torch.atanh(offset / half).float(),
            "unit": (radix // 2).float(),
            "radix": radix,
            "basis": torch.cumprod(radix, dim=0) // radix,
        }
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)

    def bound(self, raw: torch.Tensor) -> torch.Tensor:
        """Squash any numbers [B, n] into the range whose rounding is a digit minus V//2."""
        return torch.tanh(raw + self.shift) * self.reach - self.offset

    def values(self, raw: torch.Tensor) -> torch.Tensor:
        """Round to the grid, float32 [B, n] in [-1, 1]; the gradient is that of `bound`."""
        bounded = self.bound(raw)
        return (bounded + (bounded.round() - bounded).detach()) / self.unit

    def codes(self, raw: torch.Tensor) -> torch.Tensor:
        """Number the grid point of every row: Σ_j digit_j · Π_{i<j} V_i, int64 [B]."""
        digits = (self.bound(raw).round() + self.unit).long()
        return (digits * self.basis).sum(dim=1)

    def points(self) -> torch.Tensor:
        """All grid points in the order of their codes, float32 [K, n] in [-1, 1]."""
        numbers = torch.arange(int(self.radix.prod()), device=self.radix.device)
        return (numbers[:, None] // self.basis % self.radix - self.unit) / self.unit

    def distances(self, raw: torch.Tensor) -> torch.Tensor:
        """Squared distances to all points, each scalar in units of its range, float32 [B, K]."""
        return torch.cdist(self.bound(raw) / self.unit, self.points()).square()


class FsqLevel(nn.Module):
    """One grid with the layers before and behind it; reads and writes `columns` of the vector."""

    def __init__(self, columns: slice, scalars: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [columns.stop - columns.start, *hidden, len(scalars)]
        self.columns = columns
        self.grid = Grid(scalars)
        self.project = _mlp(widths)
        self.expand = _mlp(widths[::-1])

    def raw(self, vectors: torch.Tensor) -> torch.Tensor:
        """Scalars before they are bounded, float32 [B, n], of vectors [B, D]."""
        scalars: torch.Tensor = self.project(vectors[:, self.columns])
        return scalars

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Reconstruct the level's columns of vectors [B, D] from the grid."""
        part: torch.Tensor = self.expand(self.grid.values(self.raw(vectors)))
        return part

    def start(self, rows: torch.Tensor) -> None:
        """Let every scalar have mean 0 and variance 1, and the last layer fit by least squares.

        Args:
            rows: float32 [n, D].
        """
        raw = self.raw(rows)
        std = raw.std(dim=0, correction=0).clamp(min=1e-6)
        first = cast(nn.Linear, self.project[-1])
        first.weight /= std[:, None]
        first.bias.copy_((first.bias - raw.mean(dim=0)) / std)
        hidden = self.expand[:-1](self.grid.values(self.raw(rows)))
        known = functional.pad(hidden, (0, 1), value=1.0)
        ridge = _RIDGE * len(rows) * torch.eye(known.shape[1], device=rows.device)
        solved = torch.linalg.solve(known.T @ known + ridge, known.T @ rows[:, self.columns])
        last = cast(nn.Linear, self.expand[-1])
        last.weight.copy_(solved[:-1].T)
        last.bias.copy_(solved[-1])

    def codebook(self, width: int) -> torch.Tensor:
        """What each grid point adds to the vector, float32 [K, width]; 0 outside `columns`."""
        points = self.expand(self.grid.points())
        words = torch.zeros(len(points), width, device=points.device)
        words[:, self.columns] = points
        return words


class FsqNetwork(nn.Module):
    """The grids of a quantizer and, behind chunks, one linear decoder."""

    levels: nn.ModuleList

    def __init__(
        self,
        width: int,
        grids: Sequence[Sequence[int]],
        *,
        hidden: Sequence[int],
        is_chunked: bool,
    ) -> None:
        """Make the layers.

        Args:
            width: D of the vectors.
            grids: scalars of each grid.
            hidden: widths of hidden layers before the scalars, mirrored behind them.
            is_chunked: each grid codes its own part of the columns; else what the ones before
                left of all columns.
        """
        super().__init__()
        ends = [width] * len(grids)
        if is_chunked:
            ends = [width * (level + 1) // len(grids) for level in range(len(grids))]
        starts = [0, *ends[:-1]] if is_chunked else [0] * len(grids)
        self.is_chunked = is_chunked
        self.levels = nn.ModuleList(
            FsqLevel(slice(start, end), grid, hidden)
            for start, end, grid in zip(starts, ends, grids, strict=True)
        )
        self.decoder: nn.Module = nn.Linear(width, width) if is_chunked else nn.Identity()

    def loss(self, vectors: torch.Tensor) -> torch.Tensor:
        """L1 error: of the decoded chunks, or of every level's residual, averaged over levels."""
        if self.is_chunked:
            chunks = torch.cat([level(vectors) for level in self.grids()], dim=1)
            return functional.l1_loss(self.decoder(chunks), vectors)
        losses = []
        for level in self.grids():
            part = level(vectors)
            losses.append(functional.l1_loss(part, vectors))
            # A level learns what is left as it is; it does not make its predecessors leave more.
            vectors = (vectors - part).detach()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def start(self, vectors: torch.Tensor) -> None:
        """Give the random layers a sensible start; see `FsqLevel.start`.

        The source starts from plain random weights: inputs that are small beside the grid's cells
        then use few of them, and a residual level at first adds more than it takes away.

        Args:
            vectors: float32 [n, D]; the first 8192 rows are read.
        """
        rows = vectors[:_START_ROWS]
        if isinstance(self.decoder, nn.Linear):
            nn.init.eye_(self.decoder.weight)
            nn.init.zeros_(self.decoder.bias)
        for level in self.grids():
            level.start(rows)
            if not self.is_chunked:
                rows = rows - level(rows)

    def grids(self) -> list[FsqLevel]:
        """The levels with their type."""
        return [cast(FsqLevel, level) for level in self.levels]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast the projections are trained."""

    batch_size: int
    steps: int
    lr: float


def train(
    network: FsqNetwork, vectors: torch.Tensor, schedule: Schedule, *, seed: int, report: Report
) -> None:
    """Train in place by Adam with cosine decay to 0.

    Args:
        network: the grids.
        vectors: float32 [n, D], on the network's device.
        schedule: batch size, steps and peak rate.
        seed: fixes the order of the rows.
        report: called about 50 times with the step and the loss.

    Raises:
        TrainingError: when the loss is not finite.
    """
    network.start(vectors)
    optimizer = torch.optim.Adam(network.parameters(), lr=schedule.lr)
    every = max(1, schedule.steps // _REPORTS)
    batches = _batches(len(vectors), schedule.batch_size, seed=seed)
    for step in range(1, schedule.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * (1 + math.cos(math.pi * (step - 1) / schedule.steps)) / 2
        loss = network.loss(vectors[next(batches).to(vectors.device)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % every == 0 or step == schedule.steps:
            _report(step, float(loss.detach()), report)


def _report(step: int, loss: float, report: Report) -> None:
    if not math.isfinite(loss):
        raise TrainingError(f"fsq loss must stay finite, got {loss} at step {step}. Lower lr.")
    report(step, {"loss": loss})


def _batches(num_rows: int, size: int, *, seed: int) -> Iterator[torch.Tensor]:
    rng = np.random.default_rng(seed)
    while True:
        order = torch.from_numpy(rng.permutation(num_rows))
        yield from torch.split(order, size)


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
