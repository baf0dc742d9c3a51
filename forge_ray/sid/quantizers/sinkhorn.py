"""How rows get codes while a quantizer trains: the nearest one, or balanced by Sinkhorn.

Used in training only; at inference a code is the nearest codeword. Sums, extremes and moments are
those of the global batch, so the number of workers does not change an assignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from forge_ray.config import Component
from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.workers import Workers

_EPS = 1e-8


@dataclass(kw_only=True)
class AssignmentConfig(Component):
    """Which code a row gets while training; `kind` picks the rule."""

    kind: str = "sinkhorn"

    def assign(
        self, distances: torch.Tensor, *, is_last: bool, workers: Workers
    ) -> torch.Tensor | None:
        """Choose codes for a batch, or None for the nearest ones.

        Args:
            distances: float [B, K], squared L2 distances of this worker's rows.
            is_last: whether this is the last level.
            workers: who holds the rest of the batch.

        Returns:
            int64 [B].
        """
        raise NotImplementedError(f"{type(self).__name__} does not assign")


@dataclass(kw_only=True)
class NearestConfig(AssignmentConfig):
    """The nearest codeword, as at inference."""

    kind: Literal["nearest"] = "nearest"

    def assign(self, distances: torch.Tensor, *, is_last: bool, workers: Workers) -> None:
        """Leave the choice to the distances."""


@dataclass(kw_only=True)
class SinkhornConfig(AssignmentConfig):
    """Every level balanced over the batch (FORGE)."""

    kind: Literal["sinkhorn"] = "sinkhorn"
    iterations: int = 5
    """Normalisations of codes and rows; FORGE: 5."""
    sharpness: float = 10.0
    """Factor on the standardised distances, larger is closer to the nearest code; FORGE: 10."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_positive(iterations=self.iterations, sharpness=self.sharpness)

    def assign(self, distances: torch.Tensor, *, is_last: bool, workers: Workers) -> torch.Tensor:
        """Balance this level, whichever it is."""
        return balanced_assignment(
            distances, iterations=self.iterations, sharpness=self.sharpness, workers=workers
        )


@dataclass(kw_only=True)
class SinkhornLastConfig(AssignmentConfig):
    """The last level alone balanced, the others nearest: uniform semantic mapping (LC-Rec)."""

    kind: Literal["sinkhorn_last"] = "sinkhorn_last"
    iterations: int = 50
    """Normalisations of rows and codes; LC-Rec: 50."""
    epsilon: float = 0.003
    """Softness on distances scaled to [-1, 1]; LC-Rec: 0.003. A batch should have at most about as
    many rows as the last level has codes, or rows must share codes anyway."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_positive(iterations=self.iterations, epsilon=self.epsilon)
        # exp(1/epsilon) has to be a double.
        if self.epsilon < 0.002:
            raise ConfigError(
                f"quantizer.assignment.epsilon must be >= 0.002, got {self.epsilon}. Raise it."
            )

    def assign(
        self, distances: torch.Tensor, *, is_last: bool, workers: Workers
    ) -> torch.Tensor | None:
        """Balance the last level."""
        if not is_last:
            return None
        return uniform_assignment(
            distances, iterations=self.iterations, epsilon=self.epsilon, workers=workers
        )


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"quantizer.assignment.{name} must be > 0, got {value}. Raise it.")


@torch.no_grad()
def balanced_assignment(
    distances: torch.Tensor,
    *,
    iterations: int,
    sharpness: float,
    workers: Workers | None = None,
) -> torch.Tensor:
    """Assign rows to codes so that codes are used evenly.

    Source: FORGE's public code (al_sid, `balanced_argmax`): standardised distances, sharpness 10,
    5 Sinkhorn iterations. It standardises on each rank alone and works in float32; we take the
    moments of the global batch, and float64, in which shares of far rows do not vanish into ties.

    Args:
        distances: float [B, K], squared distances of this worker's rows.
        iterations: Sinkhorn normalisations of codes and rows.
        sharpness: factor on the standardised distances; larger is closer to the nearest code.
        workers: who holds the rest of the batch; none by default.

    Returns:
        int64 [B]: one code per row.
    """
    workers = workers or Workers()
    num_rows, num_codes = len(distances) * workers.size, distances.shape[1]
    least = workers.least(distances.min())
    scale = sharpness / (_deviation(distances, workers) + 1e-6)
    plan = distances.double().sub_(least).mul_(-scale).exp_()
    plan /= workers.total(plan.sum()) + _EPS
    # The plan itself stays; what iterations change are the factors of its rows and columns.
    rows, codes = plan.new_ones(len(plan)), plan.new_ones(num_codes)
    for _ in range(iterations):
        codes /= (workers.total(plan.T @ rows) * codes + _EPS) * num_codes
        rows /= ((plan @ codes) * rows + _EPS) * num_rows
    return plan.mul_(rows[:, None]).mul_(codes).argmax(dim=1)


def _deviation(distances: torch.Tensor, workers: Workers) -> torch.Tensor:
    """Standard deviation of all distances of the global batch, from each worker's moments."""
    variance, mean = torch.var_mean(distances, correction=0)
    center = workers.total(mean.clone()) / workers.size
    spread = workers.total(variance + (mean - center).square()) / workers.size
    count = distances.numel() * workers.size
    return (spread * (count / max(1, count - 1))).sqrt()


@torch.no_grad()
def uniform_assignment(
    distances: torch.Tensor,
    *,
    iterations: int,
    epsilon: float,
    workers: Workers | None = None,
) -> torch.Tensor:
    """Assign rows to codes by the transport plan whose codes all weigh the same.

    Source: LC-Rec (arXiv 2311.09049), uniform semantic mapping: distances centred between their
    extremes, epsilon 0.003, 50 iterations, float64. The extremes are those of the global batch.

    Args:
        distances: float [B, K], squared distances of this worker's rows.
        iterations: normalisations of rows and codes.
        epsilon: softness of the plan on distances in [-1, 1].
        workers: who holds the rest of the batch; none by default.

    Returns:
        int64 [B]: the code with the largest share of each row.
    """
    workers = workers or Workers()
    num_rows, num_codes = len(distances) * workers.size, distances.shape[1]
    most, least = workers.greatest(distances.max()), workers.least(distances.min())
    middle = (most.double() + least) / 2
    # Centred first: epsilon is so small that the plan would underflow otherwise.
    plan = (distances.double() - middle).div_((most - middle + 1e-5) * -epsilon).exp_()
    plan /= workers.total(plan.sum())
    rows, codes = plan.new_ones(len(plan)), plan.new_ones(num_codes)
    for _ in range(iterations):
        rows /= (plan @ codes) * rows * num_rows
        codes /= workers.total(plan.T @ rows) * codes * num_codes
    return plan.mul_(rows[:, None]).mul_(codes).argmax(dim=1)
