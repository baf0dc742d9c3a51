"""What moves codebooks beside the gradient: the start on k-means, running means, restarts.

Sums over a batch are sums over all workers, and every random draw follows from seed and step, so
codebooks stay equal on all workers and a resumed run draws what the uninterrupted one drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from forge_ray.sid.quantizers.base import FloatArray
from forge_ray.sid.quantizers.rq_kmeans import residual_kmeans
from forge_ray.sid.quantizers.rq_vae_network import Quantized
from forge_ray.sid.quantizers.workers import Workers

if TYPE_CHECKING:
    from forge_ray.sid.alignment.users import UserCodes

_INIT_ITERATIONS = 15
_NOISE = 0.01
"""Deviation of a restarted codeword from its residual, over sqrt(d); FORGE's tile noise."""


def start_from_kmeans(
    books: Sequence[nn.Parameter], latents: FloatArray, *, seed: int, workers: Workers
) -> None:
    """Put the codebooks on residual k-means of some latents.

    Args:
        books: [K_l, d] per level.
        latents: float32 [n, d], n at least the largest K_l; the same on all workers.
        seed: of the first centroids.
        workers: all get the first one's result.
    """
    sizes = [len(book) for book in books]
    if workers.rank == 0:
        started = residual_kmeans(latents, sizes, iterations=_INIT_ITERATIONS, seed=seed)
        for book, start in zip(books, started, strict=True):
            book.data.copy_(start)
    for book in books:
        workers.broadcast(book.data)


class RunningMeans:
    """Codebooks as exponential means of the residuals they were given (EMA).

    Source: van den Oord et al. (arXiv 1711.00937), appendix A.1, as in FORGE's code; a code that
    nobody chose keeps its place instead of decaying towards an epsilon.
    """

    counts: list[torch.Tensor]
    """Running number of rows per code, float32 [K_l] per level."""

    def __init__(self, books: Sequence[nn.Parameter], decay: float, workers: Workers) -> None:
        self.books = books
        self.decay = decay
        self.workers = workers
        self.counts = [torch.ones(len(book), device=book.device) for book in books]

    @torch.no_grad()
    def update(self, quantized: Quantized | UserCodes) -> None:
        """Move every codebook by one batch."""
        for level, book in enumerate(self.books):
            code, residual = quantized.codes[level], quantized.residuals[level]
            # Counts beside the sums: one collective a level.
            rows = torch.cat([residual, residual.new_ones(len(residual), 1)], dim=1)
            fresh = rows.new_zeros(len(book), rows.shape[1])
            self.workers.total(fresh.index_add_(0, code, rows))
            self._move(level, fresh[:, :-1], fresh[:, -1])

    def _move(self, level: int, added: torch.Tensor, fresh: torch.Tensor) -> None:
        book, counts = self.books[level], self.counts[level]
        sums = book * (counts * self.decay)[:, None] + added * (1 - self.decay)
        counts.mul_(self.decay).add_(fresh, alpha=1 - self.decay)
        # A code that nobody chose keeps its place: its sum and its count decay alike.
        means = sums / counts.clamp(min=1e-30)[:, None]
        book.copy_(torch.where((fresh > 0)[:, None], means, book))


class Restarts:
    """Puts codes that no row chose for a while onto random residuals of the batch."""

    usage: list[torch.Tensor]
    """Rows per code since the last look, by inference assignment, int64 [K_l]; this worker's."""

    def __init__(self, books: Sequence[nn.Parameter], *, seed: int, workers: Workers) -> None:
        self.books = books
        self.seed = seed
        self.workers = workers
        self.usage = [
            torch.zeros(len(book), dtype=torch.int64, device=book.device) for book in books
        ]

    def observe(self, quantized: Quantized) -> None:
        """Count the codes of a batch."""
        for usage, code in zip(self.usage, quantized.nearest, strict=True):
            usage += torch.bincount(code, minlength=len(usage))

    def forget(self) -> None:
        """Start counting anew."""
        for usage in self.usage:
            usage.zero_()

    @torch.no_grad()
    def restart(
        self,
        quantized: Quantized,
        *,
        step: int,
        counts: Sequence[torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Move the unused codes, with a little noise against ties.

        Args:
            quantized: the last batch.
            step: of the run; with the seed it decides the draws.
            counts: EMA counts to reset for moved codes; empty without EMA.
            optimizer: whose momentum of an abandoned place would drag the code away from its new
                one.
        """
        generator = _generator(self.seed, step)
        for level, book in enumerate(self.books):
            total = self.workers.total(self.usage[level].clone())
            dead = torch.nonzero(total == 0).flatten()
            residual = self.workers.gather(quantized.residuals[level])
            rows = torch.randint(len(residual), (len(dead),), generator=generator)
            noise = torch.randn(len(dead), book.shape[1], generator=generator)
            noise *= _NOISE / book.shape[1] ** 0.5
            book[dead] = residual[rows.to(book.device)] + noise.to(book.device)
            if counts:
                counts[level][dead] = 1.0
            for moment in ("exp_avg", "exp_avg_sq"):
                state: Any = optimizer.state[book].get(moment) if book in optimizer.state else None
                if state is not None:
                    state[dead] = 0.0


def _generator(*key: int) -> torch.Generator:
    seed = int(np.random.default_rng(key).integers(2**62))
    return torch.Generator().manual_seed(seed)


def random_depths(
    num_rows: int, num_levels: int, share: float, *, seed: tuple[int, ...]
) -> torch.Tensor:
    """Draw how many levels of each row the decoder sees.

    Args:
        num_rows: rows of the global batch.
        num_levels: L.
        share: of the rows that are cut; the others keep all levels.
        seed: fixes the draw.

    Returns:
        int64 [num_rows] in 1..L, uniform for rows that are cut.
    """
    generator = _generator(*seed)
    depths = torch.randint(1, num_levels + 1, (num_rows,), generator=generator)
    is_cut = torch.rand(num_rows, generator=generator) < share
    return torch.where(is_cut, depths, num_levels)
