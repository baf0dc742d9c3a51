"""The training loop of the RQ-VAE: step types, losses, assignment, restarts and schedule.

Single process. B rows, L levels, d latent width, K codes of a level.
Source: FORGE (arXiv 2509.20904) and its public code; formulas as in `RqVaeConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from forge_ray.errors import TrainingError
from forge_ray.sid.alignment.pair_contrast import PairContrast, false_negatives_of
from forge_ray.sid.quantizers.base import FloatArray, Report, TrainingPairs, squared_distances
from forge_ray.sid.quantizers.rq_kmeans import residual_kmeans
from forge_ray.sid.quantizers.sinkhorn import balanced_assignment

if TYPE_CHECKING:
    from forge_ray.sid.quantizers.rq_vae import RqVae, RqVaeConfig, RqVaeNetwork

_REPORTS = 50
"""Points of the loss curve, whatever the number of steps."""
_RESTART_UNTIL = 0.8
"""Share of the steps after which codes are left to settle."""
_INIT_ITERATIONS = 15


@dataclass(frozen=True, eq=False)
class Quantized:
    """One batch after the codebooks."""

    reconstruction: torch.Tensor
    """float32 [B, D], with straight-through gradient to the encoder."""
    commitment: torch.Tensor
    """Scalar, mean over levels."""
    codes: list[torch.Tensor]
    """Training assignment, int64 [B] per level."""
    nearest: list[torch.Tensor]
    """Inference assignment, int64 [B] per level."""
    residuals: list[torch.Tensor]
    """What each level had to code, float32 [B, d] per level, without gradient."""
    gap: torch.Tensor
    """Scalar: mean squared distance of latent and codeword sum over the latent's mean square."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one step: reconstruction rows first, then anchors, then positives."""

    plain: torch.Tensor
    """int64 rows to reconstruct."""
    anchor: torch.Tensor
    """int64 rows of pair anchors."""
    positive: torch.Tensor
    """int64 rows of pair positives."""


def train(model: RqVae, vectors: FloatArray, pairs: TrainingPairs | None, report: Report) -> None:
    """Train a model in place.

    Args:
        model: the RQ-VAE; its network is on the device to train on.
        vectors: float32 [n, D].
        pairs: rows for the contrastive steps, or None for reconstruction alone.
        report: called about 50 times with step number and metrics.

    Raises:
        TrainingError: when the loss is not finite.
    """
    trainer = _Trainer(model, vectors)
    total = num_steps(model.config, len(vectors), has_pairs=pairs is not None)
    every = max(1, total // _REPORTS)
    batches = _batches(model.config, len(vectors), pairs, total, seed=model.seed)
    for step, batch in enumerate(batches):
        metrics = trainer.step(batch, step, total)
        if (step + 1) % every == 0 or step + 1 == total:
            report(step + 1, metrics)


def num_steps(config: RqVaeConfig, num_vectors: int, *, has_pairs: bool) -> int:
    """Count optimiser steps: `epochs` of reconstruction plus the pair share, bounded.

    Args:
        config: batch sizes, epochs and mixing.
        num_vectors: training vectors.
        has_pairs: whether contrastive steps are mixed in.
    """
    plain_share = 1 - config.pair_share if has_pairs else 1.0
    if config.mixing == "masked":
        per_epoch = math.ceil(num_vectors / max(1, round(config.batch_size * plain_share)))
        return max(1, min(config.max_steps, config.epochs * per_epoch))
    per_epoch = math.ceil(num_vectors / config.batch_size)
    return max(1, min(config.max_steps, math.ceil(config.epochs * per_epoch / plain_share)))


def learning_rate(config: RqVaeConfig, step: int, total: int) -> float:
    """Linear warm-up from 0, then cosine to `min_lr`; fractional in the step."""
    warmup = config.warmup * total
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def quantize(network: RqVaeNetwork, latents: torch.Tensor, config: RqVaeConfig) -> Quantized:
    """Assign a batch of latents [B, d] to codes and decode the result.

    The running sum q_l carries gradient to the codebooks through the commitment alone; the decoder
    sees the straight-through value, whose gradient goes to the encoder.
    """
    target = latents.detach()
    residual = target
    total = torch.zeros_like(target)
    losses, codes, nearest, residuals = [], [], [], []
    for codebook in network.codebooks:
        distances = squared_distances(residual, codebook.detach())
        closest = distances.argmin(dim=1)
        code = _assign(distances, closest, config)
        word = functional.embedding(code, codebook)
        residuals.append(residual)
        before = total.detach()
        total = total + word
        quantized = total if config.commitment == "cumulative" else before + word
        losses.append(_commitment(latents, quantized, config))
        residual = residual - word.detach()
        codes.append(code)
        nearest.append(closest)
    straight_through = latents + (total - latents).detach()
    gap = residual.square().mean() / target.square().mean().clamp(min=1e-12)
    return Quantized(
        network.decoder(straight_through),
        torch.stack(losses).mean(),
        codes,
        nearest,
        residuals,
        gap,
    )


def _assign(distances: torch.Tensor, closest: torch.Tensor, config: RqVaeConfig) -> torch.Tensor:
    if not config.sinkhorn:
        return closest
    return balanced_assignment(
        distances, iterations=config.sinkhorn_iterations, sharpness=config.sinkhorn_sharpness
    )


def _commitment(
    latents: torch.Tensor, quantized: torch.Tensor, config: RqVaeConfig
) -> torch.Tensor:
    loss = config.encoder_commitment * functional.mse_loss(latents, quantized.detach())
    if config.ema:
        return loss
    return loss + config.codebook_commitment * functional.mse_loss(quantized, latents.detach())


class _Trainer:
    """One optimiser over network and temperatures, and the bookkeeping between steps."""

    model: RqVae
    inputs: torch.Tensor
    """float32 [n, D], scaled."""
    contrast: PairContrast
    optimizer: torch.optim.AdamW
    usage: list[torch.Tensor]
    """Items per code and level since the last look, by inference assignment."""
    counts: list[torch.Tensor]
    """EMA of items per code."""
    generator: torch.Generator

    def __init__(self, model: RqVae, vectors: FloatArray) -> None:
        config = model.config
        device = model.network.codebooks[0].device
        self.model = model
        self.inputs = torch.from_numpy(np.array(vectors, dtype=np.float32)).to(device)
        self.inputs /= model.scale
        self.contrast = PairContrast(
            temperature=config.temperature,
            max_scale=config.max_scale,
            normalize_inputs=config.normalize_inputs,
        ).to(device)
        self.generator = torch.Generator().manual_seed(model.seed)
        model.network.train().requires_grad_(True)
        if config.kmeans_init:
            self._init_codebooks()
        self.optimizer = self._build_optimizer()
        self.usage = [torch.zeros(len(c), dtype=torch.int64, device=device) for c in self.books]
        self.counts = [torch.ones(len(c), device=device) for c in self.books]

    @property
    def books(self) -> list[nn.Parameter]:
        return list(self.model.network.codebooks)

    def step(self, batch: Batch, step: int, total: int) -> dict[str, float]:
        """Run one optimiser step and return its metrics."""
        config = self.model.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total)
        losses, quantized = self._losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"quantizer loss must stay finite, got {loss.item()} at step {step + 1} of {total}."
                " Lower quantizer.lr or check the vectors with `forge-ray data validate`."
            )
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        metrics = self._metrics(losses, quantized)
        self.optimizer.step()
        self._after_step(quantized, step, total)
        return metrics

    def _losses(self, batch: Batch) -> tuple[dict[str, torch.Tensor], Quantized]:
        rows = torch.cat([batch.plain, batch.anchor, batch.positive])
        inputs = self.inputs[rows]
        network, config = self.model.network, self.model.config
        quantized = quantize(network, network.encoder(inputs), config)
        losses = {"commitment": quantized.commitment}
        split = [len(batch.plain), len(batch.anchor), len(batch.positive)]
        plain, raw_a, raw_b = torch.split(inputs, split)
        plain_out, out_a, out_b = torch.split(quantized.reconstruction, split)
        if len(plain):
            losses["reconstruction"] = functional.mse_loss(plain_out, plain)
        if len(batch.anchor):
            masked = config.mask_false_negatives
            excluded = false_negatives_of(batch.anchor, batch.positive) if masked else None
            excluded = None if excluded is None else excluded.to(inputs.device)
            i2i = self.contrast((out_a, out_b), (raw_a, raw_b), false_negatives=excluded)
            losses["contrastive"] = config.i2i_weight * i2i
        return losses, quantized

    def _metrics(self, losses: dict[str, torch.Tensor], quantized: Quantized) -> dict[str, float]:
        gradients = [book.grad for book in self.books if book.grad is not None]
        norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
        metrics = {name: float(value.detach()) for name, value in losses.items()}
        metrics |= {"codebook_gradient": norm, "latent_gap": float(quantized.gap)}
        for level, code in enumerate(quantized.nearest, start=1):
            used = len(torch.bincount(code).nonzero()) / min(len(self.books[level - 1]), len(code))
            metrics[f"batch_usage_level_{level}"] = used
        return metrics

    def _after_step(self, quantized: Quantized, step: int, total: int) -> None:
        config = self.model.config
        if config.ema:
            self._move_averages(quantized)
        if not config.dead_code_restart:
            return
        for usage, code in zip(self.usage, quantized.nearest, strict=True):
            usage += torch.bincount(code, minlength=len(usage))
        if (step + 1) % config.restart_every == 0:
            if step + 1 <= _RESTART_UNTIL * total:
                self._restart_dead(quantized)
            for usage in self.usage:
                usage.zero_()

    @torch.no_grad()
    def _move_averages(self, quantized: Quantized) -> None:
        decay = self.model.config.ema_decay
        for level, book in enumerate(self.books):
            code, residual = quantized.codes[level], quantized.residuals[level]
            fresh = torch.bincount(code, minlength=len(book)).float()
            sums = (book * self.counts[level][:, None]).mul_(decay)
            sums.index_add_(0, code, residual, alpha=1 - decay)
            self.counts[level].mul_(decay).add_(fresh, alpha=1 - decay)
            # A code that nobody chose keeps its place: its sum and its count decay alike.
            means = sums / self.counts[level].clamp(min=1e-30)[:, None]
            book.copy_(torch.where((fresh > 0)[:, None], means, book))

    @torch.no_grad()
    def _restart_dead(self, quantized: Quantized) -> None:
        """Put codes that nobody chose onto random residuals, with a little noise against ties."""
        for level, book in enumerate(self.books):
            dead = torch.nonzero(self.usage[level] == 0).flatten()
            residual = quantized.residuals[level]
            rows = torch.randint(len(residual), (len(dead),), generator=self.generator)
            noise = torch.randn(len(dead), book.shape[1], generator=self.generator)
            noise *= 0.01 / book.shape[1] ** 0.5
            book[dead] = residual[rows.to(book.device)] + noise.to(book.device)
            self.counts[level][dead] = 1.0
            # Momentum of the abandoned position would drag the code away from its new one.
            for moment in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state[book].get(moment)
                if state is not None:
                    state[dead] = 0.0

    @torch.no_grad()
    def _init_codebooks(self) -> None:
        config, network = self.model.config, self.model.network
        wanted = min(len(self.inputs), max(config.kmeans_vectors, *config.codebook_sizes))
        rows = torch.randperm(len(self.inputs), generator=self.generator)[:wanted]
        latents = network.encoder(self.inputs[rows.to(self.inputs.device)]).cpu().numpy()
        books = residual_kmeans(
            latents, config.codebook_sizes, iterations=_INIT_ITERATIONS, seed=self.model.seed
        )
        for book, start in zip(self.books, books, strict=True):
            book.copy_(start)

    def _build_optimizer(self) -> torch.optim.AdamW:
        config = self.model.config
        parameters = [*self.model.network.named_parameters(), *self.contrast.named_parameters()]
        if config.ema:
            parameters = [(n, p) for n, p in parameters if not n.startswith("codebooks")]
        decayed = [p for _, p in parameters if p.ndim >= 2]
        plain = [p for _, p in parameters if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=config.lr)


def _batches(
    config: RqVaeConfig,
    num_vectors: int,
    pairs: TrainingPairs | None,
    total: int,
    *,
    seed: int,
) -> Iterator[Batch]:
    """The rows of every step, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed + 1)
    none = torch.zeros(0, dtype=torch.int64)
    if pairs is None:
        for rows in _shuffled(num_vectors, config.batch_size, total, generator):
            yield Batch(rows, none, none)
        return
    anchor, positive = torch.from_numpy(pairs.anchor), torch.from_numpy(pairs.positive)
    if config.mixing == "masked":
        num_plain = max(1, round(config.batch_size * (1 - config.pair_share)))
        num_pairs = max(2, (config.batch_size - num_plain) // 2)
        plain = _shuffled(num_vectors, num_plain, total, generator)
        pair_rows = _shuffled(len(pairs), num_pairs, total, generator)
        for rows, chosen in zip(plain, pair_rows, strict=True):
            yield Batch(rows, anchor[chosen], positive[chosen])
        return
    plain = _shuffled(num_vectors, config.batch_size, total, generator)
    pair_rows = _shuffled(len(pairs), config.pair_batch_size, total, generator)
    for is_pair in _step_types(total, config.pair_share, generator):
        if is_pair:
            chosen = next(pair_rows)
            yield Batch(none, anchor[chosen], positive[chosen])
        else:
            yield Batch(next(plain), none, none)


def _step_types(total: int, pair_share: float, generator: torch.Generator) -> list[bool]:
    """Contrastive steps in exact proportion, in random order."""
    kinds = torch.arange(total) < round(total * pair_share)
    return kinds[torch.randperm(total, generator=generator)].tolist()


def _shuffled(
    num_rows: int, batch_size: int, num_batches: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Batches that pass over all rows before any row repeats, at most `num_batches` of them."""
    size = min(batch_size, num_rows)
    queue = torch.zeros(0, dtype=torch.int64)
    for _ in range(num_batches):
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(num_rows, generator=generator)])
        yield queue[:size]
        queue = queue[size:]
