"""What trials will take, from what stages took: medians of measured seconds, nothing assumed.

A stage without a measurement is unknown and stays so. Measurements come from the sweep's own ledger
and from sweeps beside it on the same dataset, as far as those did the same work.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.config import canonical_json
from forge_ray.sweep.ledger import Ledger, SweepRecords, TrialRecord
from forge_ray.sweep.prices import Prices, cost_of
from forge_ray.sweep.searcher import TrialSpec
from forge_ray.sweep.trial import StageReport, Stages
from forge_ray.sweep.views import STAGES

OWN, OTHERS, UNKNOWN = "this sweep", "other sweeps", "unknown"


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What a stage of a trial is expected to take.

    Attributes:
        stage: Its name.
        seconds: Median of the measurements; None where there is none.
        cost_usd: At the sweep's prices; None where the seconds are unknown.
        num: Measurements behind it.
        source: Where they come from.
    """

    stage: str
    seconds: float | None = None
    cost_usd: float | None = None
    num: int = 0
    source: str = UNKNOWN


@dataclass(frozen=True, kw_only=True)
class TrialEstimate:
    """What a trial is expected to take, from its start or from where it was interrupted.

    Attributes:
        stages: The stages ahead of it.
    """

    stages: tuple[StageEstimate, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether every stage has a measurement; the sums are lower bounds otherwise."""
        return all(one.seconds is not None for one in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds of the stages that are known."""
        return sum(one.seconds or 0.0 for one in self.stages)

    @property
    def cost_usd(self) -> float:
        """USD of the stages that are known."""
        return sum(one.cost_usd or 0.0 for one in self.stages)

    def whole_usd(self, cluster_hour: float) -> float:
        """USD of the stages that are known, and of the cluster's hours while they run."""
        return self.cost_usd + cluster_hour * self.seconds / 3600


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Seconds that a stage took once; of a training, per optimizer step."""

    stage: str
    group: str
    seconds: float
    labels: Mapping[str, str]


class StageTimes:
    """Measured stage times, looked up by what decides them.

    Args:
        own: Measurements of the sweep.
        others: Of sweeps beside it; used for the same kind of work only.
        meaning: The sweep's identity: `score` and `evaluation` decide how long those stages take.
        max_steps: Steps of a training whose configuration names none.
    """

    def __init__(
        self,
        own: Iterable[Measurement],
        others: Iterable[Measurement] = (),
        *,
        meaning: Mapping[str, Any],
        max_steps: int,
    ) -> None:
        self._own, self._others = list(own), list(others)
        self._meaning = meaning
        self._max_steps = max_steps

    def trial(
        self,
        config: Mapping[str, Any],
        *,
        held: StageReport,
        prices: Prices,
        record: TrialRecord | None = None,
        done: Collection[str] = (),
    ) -> TrialEstimate:
        """What is ahead of a trial.

        Args:
            config: Its configuration.
            held: What its stages will hold.
            prices: What that costs.
            record: What it did before it was interrupted.
            done: Stages that the store answers.
        """
        steps = _steps(config, self._max_steps)
        ahead = steps - (record.history[-1]["global_step"] if record and record.history else 0)
        skipped = {*done, *(("fit", "score") if record and record.proxies else ())}
        units = {stage: ahead if stage == "train" else 1 for stage in STAGES}
        wanted = [stage for stage in STAGES if stage not in skipped]
        return TrialEstimate(
            stages=tuple(
                self._stage(stage, config, units=units[stage], held=held, prices=prices)
                for stage in wanted
            )
        )

    def _stage(
        self,
        stage: str,
        config: Mapping[str, Any],
        *,
        units: float,
        held: StageReport,
        prices: Prices,
    ) -> StageEstimate:
        found, source = self._find(stage, group_of(stage, config, self._meaning))
        if not found:
            return StageEstimate(stage=stage)
        seconds = max(0.0, units) * statistics.median(one.seconds for one in found)
        costs = cost_of(
            {stage: seconds},
            cpus=held.cpus,
            gpus=held.gpus,
            # Where it ran last is where it will run, as far as anyone knows.
            places={stage: found[-1].labels},
            prices=prices,
        )
        return StageEstimate(
            stage=stage, seconds=seconds, cost_usd=costs[stage], num=len(found), source=source
        )

    def _find(self, stage: str, group: str) -> tuple[list[Measurement], str]:
        """Its own kind of work first, here and elsewhere, then any work of this sweep."""
        own = [one for one in self._own if one.stage == stage]
        for candidates, source in ((own, OWN), (self._others, OTHERS)):
            same = [one for one in candidates if (one.stage, one.group) == (stage, group)]
            if same:
                return same, source
        return own, f"{OWN}, other designs" if own else UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """Estimates trials of one sweep while its measurements grow.

    Attributes:
        stages: Know what a trial will hold.
        prices: What that costs.
        meaning: The sweep's identity.
        max_steps: Steps of a training whose configuration names none.
        others: Measurements of other sweeps.
    """

    stages: Stages
    prices: Prices
    meaning: Mapping[str, Any]
    max_steps: int
    others: Sequence[Measurement] = ()

    def times(self, records: SweepRecords) -> StageTimes:
        """Stage times as the ledger knows them now."""
        own = measure(records.trials.values(), meaning=self.meaning)
        return StageTimes(own, self.others, meaning=self.meaning, max_steps=self.max_steps)

    def trial(
        self,
        times: StageTimes,
        config: Mapping[str, Any],
        *,
        record: TrialRecord | None = None,
        done: Collection[str] = (),
    ) -> TrialEstimate:
        """What is ahead of a trial; arguments as in `StageTimes.trial`."""
        held = self.stages.resources(config)
        return times.trial(config, held=held, prices=self.prices, record=record, done=done)

    def waiting(self, times: StageTimes, spec: TrialSpec, records: SweepRecords) -> TrialEstimate:
        """What is ahead of a trial that waits: nothing where it is infeasible."""
        if spec.infeasible:
            return TrialEstimate()
        done = ("fit", "score") if spec.key in records.scored else ()
        record = records.trials.get(spec.key)
        return self.trial(times, spec.config, record=record, done=done)


def estimate_waiting(
    estimator: Estimator, records: SweepRecords, waiting: Iterable[TrialSpec]
) -> list[TrialEstimate]:
    """What is ahead of each waiting trial that can work."""
    times = estimator.times(records)
    return [estimator.waiting(times, one, records) for one in waiting if not one.infeasible]


def estimate_lines(waiting: Sequence[TrialEstimate], *, cluster_hour: float = 0.0) -> list[str]:
    """The estimate of all waiting trials in words; none where nothing waits.

    Args:
        waiting: What is ahead of each.
        cluster_hour: USD that an hour of the sweep costs whatever its trials do.
    """
    if not waiting:
        return []
    known = [one for one in waiting if one.is_known]
    if not known:
        missing = dict.fromkeys(
            stage.stage for one in waiting for stage in one.stages if stage.seconds is None
        )
        return [f"no measured time of {', '.join(missing)} yet: the first trials will tell"]
    seconds = sum(one.seconds for one in known)
    usd = sum(one.whole_usd(cluster_hour) for one in known)
    sources = dict.fromkeys(stage.source for one in known for stage in one.stages)
    less = "" if len(known) == len(waiting) else f" ({len(known)} of {len(waiting)} are known)"
    cost = f" and {usd:.4g} USD" if usd else ""
    return [
        f"trials that wait take {seconds:,.0f} s{cost} one by one if nothing is pruned{less}; "
        f"medians of {', '.join(sources)}"
    ]


def group_of(stage: str, config: Mapping[str, Any], meaning: Mapping[str, Any]) -> str:
    """What decides how long a stage takes, as far as the configuration says it."""
    gr = config.get("gr", {})
    if stage == "fit":
        return str(config.get("sid", {}).get("quantizer", {}).get("kind", ""))
    if stage == "score":
        return canonical_json(meaning.get("score", {}))
    if stage == "train":
        return canonical_json([gr.get("model"), gr.get("engine", {}).get("global_batch")])
    return canonical_json([gr.get("model"), meaning.get("evaluation", {})])


def measure(records: Iterable[TrialRecord], *, meaning: Mapping[str, Any]) -> list[Measurement]:
    """Stage times of trials; work that the store answered is none."""
    found = []
    for record in records:
        for stage, seconds in record.seconds.items():
            # Of an unfinished stage the seconds say nothing, but a training counts its steps.
            steps = record.history[-1]["global_step"] if record.history else 0
            is_over = {"train": steps > 0, "evaluate": bool(record.final)}
            if stage in record.cached or not is_over.get(stage, bool(record.proxies)):
                continue
            found.append(
                Measurement(
                    stage=stage,
                    group=group_of(stage, record.config, meaning),
                    seconds=seconds / steps if stage == "train" else seconds,
                    labels=record.place(stage),
                )
            )
    return found


def measure_siblings(folder: Path, *, dataset_key: str, identity_file: str) -> list[Measurement]:
    """Stage times of the sweeps in the folders beside this one, on the same dataset."""
    found = []
    for path in sorted(folder.parent.glob(f"*/{identity_file}")):
        meaning = json.loads(path.read_text(encoding="utf-8"))
        if path.parent != folder and meaning.get("dataset") == dataset_key:
            records = Ledger(path.parent).read().trials.values()
            found += measure(records, meaning=meaning)
    return found


def _steps(config: Mapping[str, Any], otherwise: int) -> int:
    return int(config.get("gr", {}).get("max_steps") or otherwise)
