"""Where trials and compute went: who was removed where, what piled up when, what was reused.

Pure functions over records. Compute is counted in one unit: money where prices are set, else GPU
seconds where a stage held a GPU, else CPU seconds.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from forge_ray.sweep.ledger import SweepRecords, TrialRecord
from forge_ray.sweep.limits import GateConfig, broken_limit
from forge_ray.sweep.prices import Prices, stage_costs
from forge_ray.sweep.views import STAGES

UnitName = Literal["USD", "GPU seconds", "CPU seconds"]

_BEFORE_TRAINING = ("fit", "score")
_KINDS: Mapping[str, tuple[str, str]] = {
    "quantizer": ("tokenizer", "fit"),
    # Made from the tokenizer within the same stage, which must not count twice.
    "sids": ("SID table", ""),
    "model": ("generator", "train"),
}
"""Artifacts that trials refer to: what they are, and the stage whose seconds they cost."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What compute is counted in."""

    name: UnitName
    prices: Prices

    def by_stage(self, record: TrialRecord) -> dict[str, float]:
        """What a trial has used, by stage."""
        if self.name == "USD":
            return stage_costs(record, self.prices)
        return record.held("GPU" if self.name == "GPU seconds" else "CPU")

    def of(self, record: TrialRecord) -> float:
        """What a trial has used."""
        return sum(self.by_stage(record).values())


def unit_of(records: Sequence[TrialRecord], prices: Prices) -> Unit:
    """Money where it is known, else the scarcer resource that was held."""
    if prices.is_set:
        return Unit(name="USD", prices=prices)
    has_gpus = any(value > 0 for one in records for value in one.gpus.values())
    return Unit(name="GPU seconds" if has_gpus else "CPU seconds", prices=prices)


@dataclass(frozen=True, kw_only=True)
class Removal:
    """One step of the waterfall.

    Attributes:
        step: What happened there.
        ended: Trials that ended there.
        left: Trials that went on.
        used: What those that ended had used.
        spared: What they would have used on top had they gone on like the median complete trial;
            None where nothing was spared, or no trial is complete.
    """

    step: str
    ended: int
    left: int
    used: float
    spared: float | None


def waterfall(records: SweepRecords, gate: GateConfig, unit: Unit) -> list[Removal]:
    """From the designs that were planned to those that are complete, in the order of the stages."""
    trials = list(records.trials.values())
    complete = [unit.of(one) for one in trials if one.state == "complete"]
    typical = statistics.median(complete) if complete else None
    ended: dict[str, list[TrialRecord]] = defaultdict(list)
    for one in trials:
        ended[ending_of(one, gate)].append(one)
    left = max(records.planned, len(trials))
    rungs = sorted({name for name in ended if name.startswith(_RUNG)}, key=_step)
    waiting = records.unstarted()
    rows = [
        _removal(
            "not started yet",
            waiting,
            ended=left - len(trials),
            before=left,
            unit=unit,
            typical=None,
        )
    ]
    for step in (*_EARLY, *rungs, "failed", "unfinished"):
        spares = typical if step in (*_EARLY, *rungs) else None
        rows.append(
            _removal(
                step,
                ended[step],
                ended=len(ended[step]),
                before=rows[-1].left,
                unit=unit,
                typical=spares,
            )
        )
    # Designs that were scored and left the plan are none of it, and used something all the same.
    return [row for row in rows if row.ended or row.used]


_EARLY = ("too few SIDs", "hard limits", "proxy gate")
_RUNG = "halving at step "


def ending_of(record: TrialRecord, gate: GateConfig) -> str:
    """Where a trial ended, in the words of the waterfall; `running` trials are `unfinished`."""
    if record.pruned_by == "gate":
        if record.proxies.get("infeasible"):
            return _EARLY[0]
        has_limit = gate.mode != "off" and broken_limit(record.proxies, gate)
        return _EARLY[1] if has_limit else _EARLY[2]
    if record.pruned_by == "asha":
        return f"{_RUNG}{record.history[-1]['global_step'] if record.history else 0}"
    return "unfinished" if record.state == "running" else record.state


def _step(name: str) -> int:
    return int(name.removeprefix(_RUNG))


def _removal(
    step: str,
    gone: Sequence[TrialRecord],
    *,
    ended: int,
    before: int,
    unit: Unit,
    typical: float | None,
) -> Removal:
    used = [unit.of(one) for one in gone]
    spared = None if typical is None else sum(max(0.0, typical - one) for one in used)
    return Removal(step=step, ended=ended, left=before - ended, used=sum(used), spared=spared)


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What had been used by when.

    Attributes:
        hours: Hours that the sweep had run, pauses between sessions left out; ascending.
        by_stage: Cumulative use at those hours, by stage; `cluster` for the hours
            themselves.
    """

    hours: list[float]
    by_stage: dict[str, list[float]]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(one[-1] for one in self.by_stage.values()) if self.hours else 0.0


def timeline(records: SweepRecords, unit: Unit) -> Timeline:
    """Cumulative use; tokenizing and scoring count from a trial's start, the rest from its end.

    The ledger knows when trials start and end, not when each stage does.
    """
    spans = [(_time(first), _time(last)) for first, last in records.spans]
    events = sorted(_moments(records, unit, spans), key=lambda one: one[0])
    hours, sums = [0.0], {stage: [0.0] for stage in STAGES}
    for hour, stage, used in events:
        hours.append(hour)
        for name, values in sums.items():
            values.append(values[-1] + (used if name == stage else 0.0))
    running = sum(end - start for start, end in spans) / 3600
    if hours[-1] < running:
        hours.append(running)
        for values in sums.values():
            values.append(values[-1])
    hourly = unit.prices.cluster_hour if unit.name == "USD" else 0.0
    if hourly:
        sums["cluster"] = [hourly * one for one in hours]
    return Timeline(hours=hours, by_stage=sums)


def _moments(
    records: SweepRecords, unit: Unit, spans: Sequence[tuple[float, float]]
) -> list[tuple[float, str, float]]:
    last = max((end for _, end in spans), default=0.0)
    found = []
    for one in (*records.trials.values(), *records.unstarted()):
        start = _time(one.started) if one.started else last
        end = _time(one.ended) if one.ended else last
        for stage, used in unit.by_stage(one).items():
            if used:
                found.append(
                    (
                        _running_hours(start if stage in _BEFORE_TRAINING else end, spans),
                        stage,
                        used,
                    )
                )
    return found


def _running_hours(at: float, spans: Sequence[tuple[float, float]]) -> float:
    return sum(max(0.0, min(at, end) - start) for start, end in spans) / 3600


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """One kind of artifact and who shared it.

    Attributes:
        kind: What it is.
        num_uses: Trials that have one.
        num_distinct: Different ones.
        num_shared: Of those, used by two trials or more.
        most: Trials on the one used most.
        saved_s: Seconds that sharing saved: for each artifact what its dearest trial took for the
            stage, less what each of the others took; None where no stage is counted for the kind.
    """

    kind: str
    num_uses: int
    num_distinct: int
    num_shared: int
    most: int
    saved_s: float | None


def reuse(records: Sequence[TrialRecord]) -> list[Reuse]:
    """What trials shared, by kind of artifact."""
    rows = []
    for name, (kind, stage) in _KINDS.items():
        users: dict[str, list[TrialRecord]] = defaultdict(list)
        for one in records:
            if name in one.artifacts:
                users[one.artifacts[name]].append(one)
        if users:
            rows.append(
                Reuse(
                    kind=kind,
                    num_uses=sum(len(group) for group in users.values()),
                    num_distinct=len(users),
                    num_shared=sum(len(group) > 1 for group in users.values()),
                    most=max(len(group) for group in users.values()),
                    saved_s=sum(_saved(one, stage) for one in users.values()) if stage else None,
                )
            )
    return rows


def _saved(group: Sequence[TrialRecord], stage: str) -> float:
    took = [one.seconds.get(stage, 0.0) for one in group]
    return max(took) * len(took) - sum(took)
