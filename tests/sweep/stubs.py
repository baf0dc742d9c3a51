"""Stand-ins for the stages of a trial: seconds become milliseconds, everything else is real."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError
from forge_ray.sweep.capacity import Demand
from forge_ray.sweep.searcher import Rejection, Resolved
from forge_ray.sweep.trial import StageReport


@dataclass(frozen=True)
class StubStages:
    """A design is `kind`, `quality` (0..1) and more; `folder` logs every stage that ran."""

    folder: str
    max_steps: int = 30
    step_s: float = 0.0
    fit_s: float = 0.01
    """Seconds that tokenizing claims."""
    cpus: tuple[tuple[str, float], ...] = (("fit", 1.0), ("train", 2.0))

    def tokenize(self, config: Mapping[str, Any]) -> StageReport:
        is_known = any(
            one == {"stage": "tokenize", "config": dict(config)}
            for one in stages_run(Path(self.folder))
        )
        self.note("tokenize", config)
        if config.get("kind") == "broken":
            raise ConfigError("kind must work, got broken. Use another.")
        is_random = config["kind"] == "random"
        quality = float(config.get("quality", 0.5))
        metrics = {
            "uniqueness": 1.0,
            "usage_min": 1.0,
            "backoff_bits": 12.0 - quality,
            "backoff_gain": 0.0 if is_random else quality + 0.1,
        }
        return StageReport(
            metrics=metrics,
            seconds={"fit": 0.0 if is_known else self.fit_s, "score": 0.0},
            artifacts={"sids": "sids/x"},
            cached=("fit", "score") if is_known else (),
        )

    def resources(self, config: Mapping[str, Any]) -> StageReport:
        return StageReport(cpus=dict(self.cpus), gpus={"train": 1.0})

    def demands(self, configs: Iterable[Mapping[str, Any]]) -> list[tuple[Demand, ...]]:
        return []

    def train(
        self, config: Mapping[str, Any], sids: str, *, name: str, callbacks: Sequence[Any]
    ) -> StageReport:
        self.note("train", config)
        if config["kind"] == "unreachable" and self.is_first(config):
            raise OSError("AWS Error NETWORK_CONNECTION")
        for step in range(10, self.max_steps + 1, 10):
            if config["kind"] == "lost" and step == 20 and self.is_first(config):
                time.sleep(0.5)  # the driver most likely has the row of step 10
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.step_s)
            value = float(config.get("quality", 0.5)) * step / self.max_steps
            for callback in callbacks:
                row = {"global_step": step, "ItemNDCG@10": value, "loss": 1.0}
                row |= {"node_labels": {"zone": "here"}, "workers_started": time.time()}
                callback.after_report(None, [row], None)
        return StageReport(metrics={"global_step": self.max_steps}, artifacts={"model": "model/x"})

    def evaluate(self, config: Mapping[str, Any], *, model: str) -> StageReport:
        self.note("evaluate", config)
        value = float("nan") if config["kind"] == "nan" else float(config.get("quality", 0.5))
        metrics = {"ItemNDCG@10": value, "ItemHit@10": 2 * value}
        return StageReport(metrics=metrics, seconds={"evaluate": 0.0})

    def is_first(self, config: Mapping[str, Any]) -> bool:
        """Whether a design trains for the first time."""
        seen = [one for one in stages_run(Path(self.folder)) if one["stage"] == "train"]
        return sum(one["config"] == dict(config) for one in seen) == 1

    def note(self, stage: str, config: Mapping[str, Any]) -> None:
        with Path(self.folder, "stages.log").open("a") as stream:
            stream.write(json.dumps({"stage": stage, "config": dict(config)}) + "\n")


def stub_resolve(point: Mapping[str, Any]) -> Resolved:
    config = dict(point)
    if config.get("kind") == "invalid":
        raise ConfigError("kind must be valid, got invalid. Use another.")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    reason = "capacity too small; not fitted" if config.get("levels") == 1 else ""
    rejected = Rejection(rule="capacity", reason=reason) if reason else None
    facts = {"sid_bits": 8.0 * config.get("levels", 3)}
    return Resolved(key=digest, config=config, infeasible=reason, facts=facts, rejected=rejected)


def stages_run(folder: Path) -> list[dict[str, Any]]:
    path = folder / "stages.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
