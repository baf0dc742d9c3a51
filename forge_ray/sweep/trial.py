"""One trial: tokenizer and proxies, the gate's answer, then training and the final evaluation.

The trial function reports and waits; its stages do the work in Ray tasks and in a nested Ray Train
run. It may be started again at any time: every stage is answered from the artifact store or resumes
by its name. What a stage computes is behind the `Stages` protocol.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray.train
from ray import tune

from forge_ray.errors import ConfigError
from forge_ray.sweep.bridge import relay
from forge_ray.sweep.capacity import Demand
from forge_ray.sweep.limits import GateConfig, missing_proxies
from forge_ray.sweep.patience import outlast


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What a stage tells the ledger.

    Attributes:
        metrics: Proxies or ranking metrics.
        seconds: Wall-clock seconds by step.
        artifacts: References by kind.
        cached: Steps answered from the store.
        cpus: CPUs held, by step.
        gpus: GPUs held, by step.
        places: Labels of the Ray node, by step.
        history: All rows of a training, those of earlier attempts included.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    cached: tuple[str, ...] = ()
    cpus: dict[str, float] = field(default_factory=dict)
    gpus: dict[str, float] = field(default_factory=dict)
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()


class Stages(Protocol):
    """The work of a trial; picklable."""

    def tokenize(self, config: Mapping[str, Any]) -> StageReport:
        """Fits SIDs (artifact `sids`) and scores them."""

    def resources(self, config: Mapping[str, Any]) -> StageReport:
        """CPUs and GPUs that each step will hold; known before any work."""

    def demands(self, configs: Iterable[Mapping[str, Any]]) -> list[tuple[Demand, ...]]:
        """What these trials hold process by process, stage by stage; alike ones once."""

    def train(
        self,
        config: Mapping[str, Any],
        sids: str,
        *,
        name: str,
        callbacks: Sequence[ray.train.UserCallback],
    ) -> StageReport:
        """Trains a generator on the SIDs (artifact `model`); resumes by name."""

    def evaluate(self, config: Mapping[str, Any], *, model: str) -> StageReport:
        """Metrics of the trained generator on the whole validation split."""


@dataclass(frozen=True, kw_only=True)
class TrialRules:
    """What the trial checks before it reports: names that pruning depends on."""

    gate: GateConfig
    metric: str


ERROR, WAITING = "error", "waiting"
"""Rows that are no results: the trial's own error follows; a stage waits for its storage."""


def run_trial(params: Mapping[str, Any], *, stages: Stages, rules: TrialRules) -> None:
    """The Tune trainable: see the module docstring.

    Tune starts a trial again whose process was lost. An error of the trial itself would only come
    again; a row says so before it is raised.

    Args:
        params: `TrialSpec.params()`.
        stages: The work.
        rules: Checks on what is reported.

    Raises:
        ConfigError: The gate needs a proxy that scoring does not give.
    """
    try:
        _run_stages(params, stages=stages, rules=rules)
    except Exception:
        tune.report({"stage": ERROR, "global_step": 0})
        raise


def _run_stages(params: Mapping[str, Any], *, stages: Stages, rules: TrialRules) -> None:
    config = params["config"]
    reason = "" if rules.gate.mode == "off" else params["infeasible"]
    tokenized = StageReport(metrics={"infeasible": reason}) if reason else _tokenize(stages, config)
    missing = missing_proxies(tokenized.metrics, rules.gate)
    if missing:
        raise ConfigError(
            f"gate must use proxies that scoring gives, got {', '.join(missing)} missing. "
            "Set the limit to null or score them."
        )
    seconds = dict(tokenized.seconds)
    # Blocks until the gate answered; a pruned trial ends here.
    tune.report(_row("proxy", 0, tokenized, seconds, proxy=tokenized.metrics))
    trained = outlast(
        lambda: _train(params, tokenized, seconds, stages=stages, rules=rules), say=_say
    )
    model = trained.artifacts["model"]
    final = outlast(lambda: stages.evaluate(config, model=model), say=_say)
    seconds |= final.seconds
    whole = StageReport(
        artifacts={**trained.artifacts, **final.artifacts},
        cached=(*tokenized.cached, *trained.cached, *final.cached),
        places=final.places,
    )
    row = {rules.metric: final.metrics.get(rules.metric), "row": final.metrics}
    tune.report(_row("final", int(trained.metrics["global_step"]), whole, seconds, **row))


def _say(text: str) -> None:
    tune.report({"stage": WAITING, "global_step": 0, "text": text})


def _tokenize(stages: Stages, config: Mapping[str, Any]) -> StageReport:
    return outlast(lambda: stages.tokenize(config), say=_say)


def _train(
    params: Mapping[str, Any],
    tokenized: StageReport,
    seconds: dict[str, float],
    *,
    stages: Stages,
    rules: TrialRules,
) -> StageReport:
    clock = _TrainClock()
    before = seconds.get("train", 0.0)  # held by an earlier try, which an outage ended
    sids = tokenized.artifacts["sids"]
    name = f"trial-{params['key'][:16]}"
    last_step = 0

    def report(row: dict[str, Any]) -> None:
        nonlocal last_step
        last_step = int(row["global_step"])
        seconds["train"] = before + clock.held_s(row.pop("workers_started", None))
        group, labels = row.pop("placement_group", None), row.pop("node_labels", {})
        step = {rules.metric: row[rules.metric], "row": row, "placement_group": group}
        row = _row("gr", int(row["global_step"]), None, seconds, **step)
        tune.report({**row, "places": {"train": labels}})

    try:
        trained = relay(
            lambda callbacks: stages.train(params["config"], sids, name=name, callbacks=callbacks),
            report,
            required=("global_step", rules.metric),
        )
    except OSError:
        seconds["train"] = before + clock.held_s(None)
        raise
    # A model that the store had already reported nothing: halving and Optuna see its rows now.
    for row in trained.history:
        if row["global_step"] > last_step:
            report(row)
    # A model of the store held no worker.
    seconds["train"] = before + (0.0 if "train" in trained.cached else clock.held_s(None))
    return trained


class _TrainClock:
    """Seconds that training held its resources: waiting for them is not counted."""

    def __init__(self) -> None:
        self._asked = time.time()
        self._since: float | None = None

    def held_s(self, workers_started: float | None) -> float:
        """Seconds so far.

        Args:
            workers_started: Time at which the workers of a row started, if the row says so. Those
                of the first row count: a group that replaced a lost one held resources before.
        """
        if self._since is None and workers_started is not None:
            self._since = max(self._asked, workers_started)
        return max(0.0, time.time() - (self._since or self._asked))


def _row(
    stage: str,
    step: int,
    report: StageReport | None,
    seconds: Mapping[str, float],
    **metrics: Any,
) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage, "global_step": step, **metrics}
    row["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    if report is not None:
        row |= {"artifacts": dict(report.artifacts), "cached": list(report.cached)}
        row["places"] = {step: dict(labels) for step, labels in report.places.items()}
    return row
