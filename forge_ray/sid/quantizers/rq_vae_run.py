"""A run of the RQ-VAE's trainer: feed it, report, measure, save, and keep the best model.

The same function runs in the calling process and in every worker of Ray Train; what differs is in
the hooks and in who makes the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from forge_ray.errors import TrainingError
from forge_ray.sid.quantizers.base import Report, ignore_report
from forge_ray.sid.quantizers.rq_vae_batches import StepBatch
from forge_ray.sid.quantizers.rq_vae_training import State, Trainer

if TYPE_CHECKING:
    from forge_ray.sid.quantizers.rq_vae import RqVae

REPORTS = 50
"""Points of the loss curve, whatever the number of steps."""

Select: TypeAlias = "Callable[[RqVae], Mapping[str, float]]"
"""Measures a model on held-out behaviour; called on the first worker alone."""


@dataclass(frozen=True)
class RunHooks:
    """What a run tells its caller, and what it asks."""

    report: Report = ignore_report
    """Called about 50 times with a step and its metrics."""
    select: Select | None = None
    """Measures the model `selection.checks` times; the best one is kept. None keeps the last."""
    save: Callable[[State], None] | None = None
    """Takes the whole state every `save_every` steps and at the end; called on every worker."""
    save_every: int = 0
    """Steps between saves; 0 for the end alone."""


@dataclass
class Kept:
    """The model that a run gives back, and how it was chosen."""

    step: int = 0
    """Steps it was trained for."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Its measurements; empty when it is simply the last one."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


class Run:
    """Progress of one training on one worker."""

    trainer: Trainer
    curve: list[tuple[int, dict[str, float]]]
    """What was reported, so that a resumed run has the whole curve."""
    kept: Kept

    def __init__(self, trainer: Trainer, hooks: RunHooks) -> None:
        self.trainer = trainer
        self.hooks = hooks
        self.curve = []
        self.kept = Kept()
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def restore(self, state: State) -> None:
        """Continue from a saved state; tells the reports again."""
        self.trainer.restore(state["trainer"])
        self.curve = [(step, dict(metrics)) for step, metrics in state["curve"]]
        self.kept = Kept(**state["kept"])
        self._sums = {k: v.to(self.trainer.device) for k, v in state["sums"].items()}
        self._counts = dict(state["counts"])
        for step, metrics in self.curve:
            self.hooks.report(step, metrics)

    def finish(self, batches: Iterable[StepBatch]) -> Kept:
        """Train to the last step.

        Args:
            batches: this worker's share of every step that is left, in order.

        Raises:
            TrainingError: when a loss was not finite, or the batches ended early.

        Returns:
            What to keep, on the first worker.
        """
        trainer = self.trainer
        for batch in batches:
            is_due = self._is_due(trainer.step + 1)
            self._add(trainer.advance(batch, measure=is_due))
            if is_due:
                trainer.check_finite()
                self._report()
            self._select()
            self._save()
        if trainer.step != trainer.total:
            raise TrainingError(
                f"quantizer training must see {trainer.total} batches, got {trainer.step}. "
                "Run it again; it continues from its last checkpoint."
            )
        return self.kept

    def _is_due(self, step: int) -> bool:
        total = self.trainer.total
        return step % max(1, total // REPORTS) == 0 or step == total or step in self._checks

    @property
    def _checks(self) -> tuple[int, ...]:
        """Steps after which the model is measured; the last one among them."""
        checks = self.trainer.config.selection.checks
        total = self.trainer.total
        return tuple(-(-total * number // checks) for number in range(1, checks + 1))

    def _add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def _report(self) -> None:
        """Tell the means since the last report, over all workers."""
        names = list(self._sums)
        sums = torch.stack([self._sums[name].float().to(self.trainer.device) for name in names])
        means = self.trainer.workers.total(sums / self.trainer.workers.size).tolist()
        row = {
            name: value / self._counts[name] for name, value in zip(names, means, strict=True)
        } | self.trainer.alignment.scales()
        self._sums, self._counts = {}, {}
        self.curve.append((self.trainer.step, row))
        self.hooks.report(self.trainer.step, row)

    def _select(self) -> None:
        """Measure the model where a check is due, and keep it when it is the best so far."""
        trainer, selection = self.trainer, self.trainer.config.selection
        if self.hooks.select is None or not self._checks:
            if trainer.step == trainer.total:
                self._keep({})
            return
        # The others go on to the next collective, which waits for the first worker.
        if trainer.step not in self._checks or trainer.workers.rank:
            return
        with trainer.model.frozen():
            metrics = dict(self.hooks.select(trainer.model))
        if not self.kept.metrics or selection.is_better(metrics, self.kept.metrics):
            self._keep(metrics)

    def _keep(self, metrics: dict[str, float]) -> None:
        weights = self.trainer.model.network.state_dict()
        self.kept = Kept(self.trainer.step, metrics, _copied(weights))

    def _save(self) -> None:
        hooks, step = self.hooks, self.trainer.step
        if hooks.save is None:
            return
        is_last = step == self.trainer.total
        if not is_last and (not hooks.save_every or step % hooks.save_every):
            return
        self.trainer.check_finite()
        hooks.save(
            {
                "trainer": self.trainer.state(),
                "curve": self.curve,
                "kept": asdict(self.kept),
                "sums": self._sums,
                "counts": self._counts,
            }
        )


def _copied(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in weights.items()}
