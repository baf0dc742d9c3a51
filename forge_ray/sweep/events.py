"""What happens to trials, written to the ledger and told to the person watching, one line each."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from forge_ray.sweep.budget import BudgetWatch
from forge_ray.sweep.faults import full_disk, is_full
from forge_ray.sweep.groups import StoppedGroups
from forge_ray.sweep.ledger import Ledger, json_ready
from forge_ray.sweep.patience import last_line
from forge_ray.sweep.scheduler import Decision, GateScheduler
from forge_ray.sweep.space import label_point
from forge_ray.sweep.trial import ERROR, WAITING, Stages

logger = logging.getLogger(__name__)


class SweepCallback(Callback):
    """Tune callback: puts the scheduler's reason into the result, the result into the ledger.

    Tune drops what a scheduler adds to a result, but keeps what a callback adds: this is how the
    searcher learns why a trial was stopped.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        scheduler: GateScheduler,
        metric: str,
        num_trials: int,
        stages: Stages,
        watch: BudgetWatch,
        failure: Callable[[], Exception | None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._scheduler = scheduler
        self._metric = metric
        self._num_trials = num_trials
        self._stages = stages
        self._watch = watch
        self._failure = failure
        self.groups = StoppedGroups()
        self._group_of: dict[str, str] = {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Frees what was stopped a while ago; ends the session where an outcome was not kept."""
        failure = self._failure()
        if failure is not None:
            raise failure
        self.groups.free_due()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Notes the resources of a training that may have been stopped midway."""
        self._leave(trial)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Records the start."""
        config = trial.config
        point = json.loads(config["point"])
        held = self._stages.resources(config["config"])
        self._ledger.append(
            "start",
            number=config["number"],
            key=config["key"],
            point=point,
            config=config["config"],
            facts=config["facts"],
            cpus=held.cpus,
            gpus=held.gpus,
        )
        self._watch.touch(config["key"])
        self._say(trial, f"started   {label_point(point)}")

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Records a row and the decision on it."""
        key = trial.config["key"]
        stage = result.get("stage")
        if stage in (None, ERROR, WAITING):
            self._note(trial, stage, result)
            return
        # The scheduler sees this row before the callback does.
        decision = self._scheduler.decisions.pop(key, Decision())
        result["decision"] = vars(decision).copy()
        if result.get("placement_group"):
            self._group_of[trial.trial_id] = result["placement_group"]
        row = result.get("proxy") if stage == "proxy" else result.get("row")
        metrics = {**(row or {}), "global_step": result["global_step"]}
        if stage == "gr" and not decision.pruned_by and self._is_known(key, metrics):
            return  # a training that resumed tells its past again
        optional = {name: result[name] for name in _OPTIONAL if name in result}
        self._ledger.append(
            "row",
            key=key,
            stage=stage,
            metrics=metrics,
            gate=decision.reason,
            would_prune=decision.would_prune,
            is_control=decision.is_control,
            **optional,
        )
        self._watch.touch(key)
        self._say(trial, describe_row(stage, result, decision, metric=self._metric))

    def _is_known(self, key: str, metrics: Mapping[str, Any]) -> bool:
        return json_ready(metrics) in self._ledger.follow().trials[key].history

    def _note(self, trial: Trial, stage: str | None, result: Mapping[str, Any]) -> None:
        if stage == ERROR:
            # Read by Tune when the error arrives: only a lost process is worth another start.
            trial.max_failures = 0
        elif stage == WAITING:
            self._say(trial, f"waiting   {result['text']}")

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Says that a trial whose process was lost starts again; its training's group is freed."""
        self._say(trial, f"lost      {last_line(_error_text(trial))}; it starts again")
        self._leave(trial)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Records the error's text."""
        text = last_line(_error_text(trial))
        self._ledger.append("error", key=trial.config["key"], text=text)
        self._say(trial, f"failed    {text}")
        self._leave(trial)
        if is_full(text):
            # Every other trial would fail as well. Raised here, it ends the session.
            raise full_disk("the disk of the store or of the sweep's folder", text)

    def _leave(self, trial: Trial) -> None:
        self._watch.drop(trial.config["key"])
        group = self._group_of.pop(trial.trial_id, None)
        if group is not None:
            self.groups.add(group)

    def _say(self, trial: Trial, text: str) -> None:
        number = int(trial.config["number"])
        logger.info("trial %2d/%d %s", number + 1, self._num_trials, text)


_OPTIONAL = ("seconds", "places", "artifacts", "cached")


def describe_row(stage: str, result: Mapping[str, Any], decision: Decision, *, metric: str) -> str:
    """One line about a result row."""
    if stage == "proxy":
        verb = "pruned   " if decision.pruned_by else "passed   "
        return f"{verb} gate: {decision.reason}{_spent(result)}"
    value = result.get(metric)
    shown = f"{metric} {value:.4f}" if isinstance(value, float) else f"{metric} {value}"
    if stage == "final":
        return f"complete  validation {shown}{_spent(result)}"
    verb = "pruned   " if decision.pruned_by else "training "
    tail = f"; {decision.reason}" if decision.pruned_by else ""
    return f"{verb} step {result['global_step']}: {shown}{tail}"


def _spent(result: Mapping[str, Any]) -> str:
    cached = result.get("cached") or ()
    parts = [
        f"{name} {value:.0f} s{' (cached)' if name in cached else ''}"
        for name, value in (result.get("seconds") or {}).items()
    ]
    return f" [{', '.join(parts)}]" if parts else ""


def _error_text(trial: Trial) -> str:
    # Tune copies the file to the experiment's storage later; the local one is there already.
    path = trial.error_file
    return Path(path).read_text(encoding="utf-8") if path and Path(path).exists() else ""
