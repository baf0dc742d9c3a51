"""One training step of the RQ-VAE, the same for one process and for many workers.

Losses, optimiser and what moves codebooks. `rq_vae_run` feeds it; who started the process, and
where batches come from, is somebody else's.
Source: FORGE (arXiv 2509.20904) and its public code; formulas as in `RqVaeConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from forge_ray.errors import TrainingError
from forge_ray.sid.alignment.batch import IDENTITY, AlignmentBatch, KnownPairs, UserView, View
from forge_ray.sid.alignment.diversity import CodeDiversity
from forge_ray.sid.alignment.hamr import hamming_margin
from forge_ray.sid.alignment.recon import reconstruction_loss
from forge_ray.sid.quantizers.base import FloatArray
from forge_ray.sid.quantizers.rq_vae_batches import StepBatch, StepRows, UserRows
from forge_ray.sid.quantizers.rq_vae_codebooks import (
    Restarts,
    RunningMeans,
    random_depths,
    start_from_kmeans,
)
from forge_ray.sid.quantizers.rq_vae_network import Quantized, quantize
from forge_ray.sid.quantizers.workers import Workers

if TYPE_CHECKING:
    from forge_ray.sid.alignment.module import Alignment
    from forge_ray.sid.quantizers.rq_vae import RqVae
    from forge_ray.sid.quantizers.rq_vae_config import RqVaeConfig

_RESTART_UNTIL = 0.8
"""Share of the steps after which codes are left to settle."""

State: TypeAlias = "dict[str, Any]"
"""Everything a run needs to go on: tensors, numbers and lists, for `torch.save`."""


class Trainer:
    """One optimiser over network and alignment, and the bookkeeping between steps."""

    model: RqVae
    alignment: Alignment
    optimizer: torch.optim.AdamW
    diversity: CodeDiversity | None
    means: RunningMeans | None
    user_means: RunningMeans | None
    """What moves the alignment's user codebooks, where it has any."""
    restarts: Restarts | None
    is_finite: torch.Tensor
    """Scalar bool: no loss of this worker was NaN or infinite so far."""
    step: int
    """Steps done."""

    def __init__(
        self,
        model: RqVae,
        alignment: Alignment,
        *,
        total: int,
        known: KnownPairs | None = None,
        workers: Workers | None = None,
    ) -> None:
        """Set up a run.

        Args:
            model: its network is on the device to train on.
            alignment: losses of pairs; moved to that device.
            total: steps of the run.
            known: related items, for alignments that need them.
            workers: the processes that train together; this one alone by default.
        """
        self.model, self.config, self.total = model, model.config, total
        self.workers = workers or Workers()
        self.device = model.network.codebooks[0].device
        self.alignment = alignment.to(self.device)
        self.known = known
        self.diversity = None
        if self.config.diversity.weight:
            diversity = CodeDiversity(self.config.diversity, self.config.codebook_sizes)
            self.diversity = diversity.to(self.device)
        model.network.train().requires_grad_(True)
        self.optimizer = build_optimizer(self.config, model.network, alignment)
        books = list(model.network.codebooks)
        self.means = (
            RunningMeans(books, self.config.ema_decay, self.workers) if self.config.ema else None
        )
        users = alignment.users
        self.user_means = (
            RunningMeans(list(users.codebooks), users.config.ema_decay, self.workers)
            if users is not None
            else None
        )
        self.restarts = (
            Restarts(books, seed=model.seed, workers=self.workers)
            if self.config.dead_code_restart
            else None
        )
        self.is_finite = torch.tensor(True, device=self.device)
        self.step = 0

    @torch.no_grad()
    def start(self, sample: FloatArray) -> None:
        """Place the codebooks before the first step.

        Args:
            sample: float32 [n, D] training vectors, the same on all workers.
        """
        if self.config.kmeans_init:
            inputs = torch.from_numpy(sample).to(self.device) / self.model.scale
            latents = self.model.network.encoder(inputs).cpu().numpy()
            start_from_kmeans(
                list(self.model.network.codebooks),
                latents,
                seed=self.model.seed,
                workers=self.workers,
            )

    def advance(self, batch: StepBatch, *, measure: bool) -> dict[str, torch.Tensor]:
        """Run one optimiser step.

        Args:
            batch: this worker's share of the step.
            measure: also measure codebooks and usage.

        Returns:
            Scalars without gradient: losses, and what `measure` adds.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total)
        losses, quantized = self._losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        self.is_finite &= torch.isfinite(loss.detach())
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.workers.average_gradients(parameters)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        metrics = {name: value.detach() for name, value in losses.items()}
        if measure:
            metrics |= self._measured(quantized)
        self.optimizer.step()
        self._move_codebooks(quantized)
        self.step += 1
        return metrics

    def state(self) -> State:
        """Everything that `restore` needs; independent of the number of workers."""
        usage = [] if self.restarts is None else self.restarts.usage
        return {
            "step": self.step,
            "network": self.model.network.state_dict(),
            "alignment": self.alignment.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "diversity": {} if self.diversity is None else self.diversity.state_dict(),
            "counts": [] if self.means is None else self.means.counts,
            "user_counts": [] if self.user_means is None else self.user_means.counts,
            "usage": [self.workers.total(one.clone()) for one in usage],
        }

    def restore(self, state: State) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        self.model.network.load_state_dict(state["network"])
        self.alignment.load_state_dict(state["alignment"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.diversity is not None:
            self.diversity.load_state_dict(state["diversity"])
        if self.means is not None:
            self.means.counts = [one.to(self.device) for one in state["counts"]]
        if self.user_means is not None:
            self.user_means.counts = [one.to(self.device) for one in state["user_counts"]]
        if self.restarts is not None and self.workers.rank == 0:
            # Totals over all workers; the others go on from zero.
            self.restarts.usage = [one.to(self.device) for one in state["usage"]]

    def check_finite(self) -> None:
        """Stop a run whose loss left the numbers, on all workers at once.

        Raises:
            TrainingError: when a loss was NaN or infinite.
        """
        if not self.workers.least(self.is_finite.to(torch.int32)):
            raise TrainingError(
                f"quantizer loss must stay finite, got one that is not by step {self.step} of "
                f"{self.total}. Lower quantizer.lr or check the vectors with `forge-ray data "
                "validate`."
            )

    def _losses(self, batch: StepBatch) -> tuple[dict[str, torch.Tensor], Quantized]:
        inputs = torch.from_numpy(batch.vectors).to(self.device, non_blocking=True)
        inputs = inputs / self.model.scale
        network = self.model.network
        quantized = quantize(
            network,
            network.encode(inputs),
            self.config,
            workers=self.workers,
            depths=self._depths(batch.rows),
        )
        losses = {"commitment": quantized.commitment}
        num_plain = len(batch.rows.plain)
        if num_plain:
            losses["reconstruction"] = reconstruction_loss(
                self.config.reconstruction,
                quantized.reconstruction[:num_plain],
                inputs[:num_plain],
                temperature=self.config.reconstruction_temperature,
                gather=self.workers.gather,
                rank=self.workers.rank,
            )
        losses |= self._spread(batch, quantized)
        return losses | self._aligned(batch, inputs, quantized), quantized

    def _spread(self, batch: StepBatch, quantized: Quantized) -> dict[str, torch.Tensor]:
        """Losses that keep codes apart, whatever the items' relations."""
        losses: dict[str, torch.Tensor] = {}
        if self.diversity is not None:
            books = list(self.model.network.codebooks)
            if self.step % self.config.diversity.every == 0:
                self.diversity.regroup(books, seed=self.model.seed)
            losses["diversity"] = self.diversity(quantized.codes, books)
        if self.config.hamr.weight:
            losses["hamr"] = hamming_margin(
                self.config.hamr,
                quantized.latents,
                torch.stack(quantized.codes, dim=1),
                torch.from_numpy(batch.rows.all).to(self.device),
                known=self.known,
                gather=self.workers.gather,
            )
        return losses

    def _aligned(
        self, batch: StepBatch, inputs: torch.Tensor, quantized: Quantized
    ) -> dict[str, torch.Tensor]:
        """Losses of the plain rows with themselves, and of the step's pairs."""
        rows = batch.rows
        split = [len(rows.plain), len(rows.anchor), len(rows.positive)]
        plain, anchor, positive = _views(rows, inputs, quantized, split)
        losses: dict[str, torch.Tensor] = {}
        if len(rows.plain) and self.alignment.reads_identity:
            known = {name: value[: split[0]] for name, value in batch.teachers.items()}
            losses |= self.alignment(self._batch(IDENTITY, (plain, plain), known))
        if len(rows.anchor):
            known = {name: value[split[0] :] for name, value in batch.teachers.items()}
            losses |= self.alignment(
                self._batch(rows.source, (anchor, positive), known, batch.users)
            )
        return losses

    def _batch(
        self,
        source: str,
        sides: tuple[View, View],
        teachers: Mapping[str, FloatArray],
        users: tuple[UserRows, UserRows] | None = None,
    ) -> AlignmentBatch:
        user, other = (None, None) if users is None else map(self._user_view, users)
        return AlignmentBatch(
            source=source,
            anchor=sides[0],
            positive=sides[1],
            teachers=self._tensors(teachers),
            user=user,
            user_positive=other,
            known=self.known,
            progress=self.step / self.total,
            gather=self.workers.gather,
            rank=self.workers.rank,
        )

    def _user_view(self, rows: UserRows) -> UserView:
        users = torch.from_numpy(rows.users).to(self.device)
        inputs = torch.from_numpy(rows.vectors).to(self.device)
        return UserView(users, inputs, self._tensors(rows.teachers))

    def _tensors(self, arrays: Mapping[str, FloatArray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value).to(self.device) for name, value in arrays.items()}

    def _depths(self, rows: StepRows) -> torch.Tensor | None:
        """Levels of each row that the decoder sees; drawn for the global batch."""
        if not self.config.random_depth:
            return None
        parts, rank, size = [], self.workers.rank, self.workers.size
        for part, mine in enumerate((rows.plain, rows.anchor, rows.positive)):
            drawn = random_depths(
                len(mine) * size,
                len(self.config.codebook_sizes),
                self.config.random_depth,
                seed=(self.model.seed, self.step, part),
            )
            parts.append(drawn[rank * len(mine) : (rank + 1) * len(mine)])
        return torch.cat(parts).to(self.device)

    def _measured(self, quantized: Quantized) -> dict[str, torch.Tensor]:
        books = list(self.model.network.codebooks)
        gradients = [book.grad.square().sum() for book in books if book.grad is not None]
        norm = torch.stack(gradients).sum().sqrt() if gradients else torch.zeros(())
        left, whole = self.workers.total(quantized.powers.clone())
        metrics = {"codebook_gradient": norm, "latent_gap": left / whole.clamp(min=1e-12)}
        for level, (book, code) in enumerate(zip(books, quantized.nearest, strict=True), start=1):
            counts = self.workers.total(torch.bincount(code, minlength=len(book)))
            most = min(len(book), len(code) * self.workers.size)
            metrics[f"batch_usage_level_{level}"] = (counts > 0).sum() / most
        return metrics

    def _move_codebooks(self, quantized: Quantized) -> None:
        if self.means is not None:
            self.means.update(quantized)
        if self.user_means is not None and self.alignment.coded_users is not None:
            self.user_means.update(self.alignment.coded_users)
        if self.restarts is None:
            return
        self.restarts.observe(quantized)
        done = self.step + 1
        if done % self.config.restart_every == 0:
            if done <= _RESTART_UNTIL * self.total:
                counts = [] if self.means is None else self.means.counts
                self.restarts.restart(
                    quantized, step=self.step, counts=counts, optimizer=self.optimizer
                )
            self.restarts.forget()


def _views(
    rows: StepRows, inputs: torch.Tensor, quantized: Quantized, split: list[int]
) -> tuple[View, ...]:
    """The batch cut into plain rows, anchors and positives."""
    items = torch.from_numpy(rows.all).to(inputs.device)
    columns = (
        items,
        inputs,
        quantized.latents,
        quantized.quantized,
        quantized.reconstruction,
        quantized.middle,
        torch.stack(quantized.codes, dim=1),
    )
    return tuple(
        View(*part) for part in zip(*(torch.split(c, split) for c in columns), strict=True)
    )


def build_optimizer(
    config: RqVaeConfig, network: nn.Module, alignment: nn.Module
) -> torch.optim.AdamW:
    """AdamW with decay on tensors of two and more dimensions only; codebooks left out with EMA."""
    parameters = [*network.named_parameters(), *alignment.named_parameters()]
    if config.ema:
        own = {id(p) for n, p in network.named_parameters() if n.startswith("codebooks")}
        parameters = [(name, one) for name, one in parameters if id(one) not in own]
    decayed = [p for _, p in parameters if p.ndim >= 2]
    plain = [p for _, p in parameters if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)


def learning_rate(config: RqVaeConfig, step: int, total: int) -> float:
    """Linear warm-up from 0, then cosine to `min_lr`; fractional in the step."""
    warmup = config.warmup * total
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2
