"""What a training step does together with the other workers; with one worker, nothing.

Knows torch's collectives and nothing about who started the processes. Every method with more than
one worker is a collective: all of them call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Workers:
    """The processes that train one model, each on an equal share of every global batch."""

    rank: int = 0
    """This process, 0..size-1."""
    size: int = 1
    """Processes; a process group of that size is up when it is above 1."""

    @classmethod
    def current(cls) -> Workers:
        """The workers of the process group that is up, or this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over the workers, in place, without gradient; returns it."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def least(self, values: torch.Tensor) -> torch.Tensor:
        """Keep the smallest value over the workers, in place; returns it."""
        return self._reduce(values, dist.ReduceOp.MIN)

    def greatest(self, values: torch.Tensor) -> torch.Tensor:
        """Keep the largest value over the workers, in place; returns it."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Put the rows of all workers below each other, with gradient.

        The gradient of a row is the sum over the workers of what their losses ask of it. Averaged
        over the workers afterwards (`average_gradients`), that is the gradient of the mean loss,
        whether a loss is of the whole batch on every worker or of the worker's rows alone.

        Args:
            rows: [B, …], the same shape on every worker.

        Returns:
            [size·B, …]; this worker's rows start at rank·B.
        """
        if self.size == 1:
            return rows
        if not rows.is_floating_point():
            # Gloo knows no booleans; whole numbers have no gradient.
            return _gathered(rows.to(torch.int64), self.size).to(rows.dtype)
        gathered: torch.Tensor = _Gather.apply(rows, self.rank, self.size)  # type: ignore[no-untyped-call]
        return gathered

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Overwrite a tensor by the first worker's; returns it."""
        if self.size > 1:
            dist.broadcast(values, src=0)
        return values

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace gradients by their mean over the workers, in one collective.

        Which parameters have a gradient follows from the type of the step, so it is the same on all
        workers; the others are left out.
        """
        if self.size == 1:
            return
        gradients = [one.grad for one in parameters if one.grad is not None]
        flat = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        flat /= self.size
        for gradient, mean in zip(
            gradients, torch.split(flat, [one.numel() for one in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))

    def _reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(values, op=op)
        return values


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums: gloo has no reduce-scatter, so it is an all-reduce."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        ctx.start, ctx.count = rank * len(rows), len(rows)
        return _gathered(rows, size)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.count], None, None


def _gathered(rows: torch.Tensor, size: int) -> torch.Tensor:
    parts = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
