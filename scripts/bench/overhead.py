"""Two hundred trials that do nothing: a sweep beside a bare Ray `Tuner`, in one run.

`ours` is the whole machinery on stages that return at once: gate, halving, ledger, Optuna storage,
the thread and the socket of a nested training. `bare` reports as many rows, with the same resources
and as many trials at a time. Both run in one Ray, after a trial of each to warm it; the order turns
every round, and the ratio is that of the sums. CPU seconds are those of this process and of all
that it started, Ray and its workers included.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune

from forge_ray.launch.connect import connect, disconnect
from forge_ray.sweep.capacity import Demand
from forge_ray.sweep.config import SamplerConfig, SweepConfig
from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.runner import SweepJob, run_trials
from forge_ray.sweep.searcher import Resolved
from forge_ray.sweep.trial import StageReport

NUM_TRIALS, CONCURRENT, ROUNDS, STEPS = 200, 4, 2, (10, 20, 30)
METRIC = "ItemNDCG@10"
MEMORY_MB = 512


@dataclass(frozen=True)
class NoStages:
    """Stages of a trial that return at once; see `forge_ray.sweep.trial.Stages`."""

    def tokenize(self, config: Mapping[str, Any]) -> StageReport:
        """Proxies that every limit lets pass."""
        metrics = {"uniqueness": 1.0, "usage_min": 1.0, "backoff_bits": 9.0, "backoff_gain": 1.0}
        return StageReport(metrics=metrics, artifacts={"sids": "sids/none"})

    def resources(self, config: Mapping[str, Any]) -> StageReport:
        """Nothing."""
        return StageReport()

    def demands(self, configs: Iterable[Mapping[str, Any]]) -> list[tuple[Demand, ...]]:
        """Nothing."""
        return []

    def train(
        self, config: Mapping[str, Any], sids: str, *, name: str, callbacks: Sequence[Any]
    ) -> StageReport:
        """A row for each step."""
        for step in STEPS:
            for callback in callbacks:
                callback.after_report(None, [{"global_step": step, METRIC: config["x"]}], None)
        return StageReport(metrics={"global_step": STEPS[-1]}, artifacts={"model": "model/none"})

    def evaluate(self, config: Mapping[str, Any], *, model: str) -> StageReport:
        """The final row."""
        return StageReport(metrics={METRIC: config["x"]})


def run(scale: float) -> dict[str, Any]:
    """Wall and CPU seconds of both sides over all rounds, and their ratios."""
    num = max(2, int(NUM_TRIALS * scale))
    sides = {"ours": _ours, "bare": _bare}
    wall, cpu = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
    connect(address="local", num_cpus=os.cpu_count(), dashboard=False)
    # Workers cannot import a section.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory() as folder:
        for side in sides.values():
            side(2, Path(folder, f"warm-{side.__name__}"))
        rounds = []
        for index in range(ROUNDS):
            order = list(sides) if index % 2 == 0 else list(reversed(sides))
            found = {one: _timed(sides[one], num, Path(folder, f"{one}-{index}")) for one in order}
            rounds.append({one: round(seconds, 1) for one, (seconds, _) in found.items()})
            for one, (seconds, spent) in found.items():
                wall[one] += seconds
                cpu[one] += spent
    disconnect()
    return {
        "trials": num,
        "max_concurrent": CONCURRENT,
        "rows_per_trial": 2 + len(STEPS),
        "rounds": rounds,
        "ours_s": round(wall["ours"], 1),
        "bare_s": round(wall["bare"], 1),
        "wall_ratio": round(wall["ours"] / wall["bare"], 3),
        "ours_cpu_s": round(cpu["ours"], 1),
        "bare_cpu_s": round(cpu["bare"], 1),
        "cpu_ratio": round(cpu["ours"] / cpu["bare"], 3),
    }


def _timed(side: Callable[[int, Path], None], num: int, folder: Path) -> tuple[float, float]:
    began, spent = time.perf_counter(), _cpu_seconds()
    side(num, folder)
    return time.perf_counter() - began, _cpu_seconds() - spent


def _ours(num: int, folder: Path) -> None:
    config = SweepConfig(
        name="overhead",
        space={"x": {"float": [0.0, 1.0]}},
        sampler=SamplerConfig(kind="quasi_random"),
        num_trials=num,
        max_concurrent=CONCURRENT,
        order="planned",
        metric=METRIC,
        # Everything is decided, nothing is stopped: both sides report the same rows.
        gate=GateConfig(random_share=1.0),
        asha=AshaConfig(grace_steps=STEPS[0], min_earlier=num + 1),
    )
    config.resources.trial_memory_mb = MEMORY_MB
    job = SweepJob(
        config=config,
        folder=folder,
        dataset_key="none",
        stages=NoStages(),
        resolve=_resolve,
        max_steps=STEPS[-1],
    )
    outcome = run_trials(job)
    done = [one for one in outcome.records.trials.values() if one.state == "complete"]
    reasons = {one.reason for one in outcome.records.trials.values() if one.state != "complete"}
    assert len(done) == num, f"{len(done)} of {num} trials are complete: {reasons}"


def _bare(num: int, folder: Path) -> None:
    resources = tune.PlacementGroupFactory([{"CPU": 0, "memory": MEMORY_MB * 1024**2}])
    tuner = tune.Tuner(
        tune.with_resources(_report_rows, resources),
        param_space={"x": tune.uniform(0.0, 1.0)},
        tune_config=tune.TuneConfig(
            num_samples=num, max_concurrent_trials=CONCURRENT, reuse_actors=False
        ),
        run_config=tune.RunConfig(name="bare", storage_path=str(folder), verbose=0),
    )
    assert len(tuner.fit()) == num


def _report_rows(config: Mapping[str, Any]) -> None:
    for step in (0, *STEPS, STEPS[-1]):
        tune.report({"global_step": step, METRIC: config["x"]})


def _resolve(point: Mapping[str, Any]) -> Resolved:
    digest = hashlib.sha256(json.dumps(dict(point), sort_keys=True).encode()).hexdigest()
    return Resolved(key=digest, config=dict(point))


def _cpu_seconds() -> float:
    """CPU seconds of this process and of everything that it started, Ray and workers included."""
    own = os.getpid()
    parents = {int(entry.name): _stat(int(entry.name)) for entry in Path("/proc").glob("[0-9]*")}
    total = 0.0
    for pid, (_, seconds) in parents.items():
        if _is_below(pid, own, parents):
            total += seconds
    return total / os.sysconf("SC_CLK_TCK")


def _is_below(pid: int, root: int, parents: Mapping[int, tuple[int, float]]) -> bool:
    while pid in parents and pid != root:
        pid = parents[pid][0]
    return pid == root


def _stat(pid: int) -> tuple[int, float]:
    """Parent, and clock ticks of a process together with those of its children that ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0.0  # it ended meanwhile
    return int(fields[1]), float(sum(int(one) for one in fields[11:15]))
