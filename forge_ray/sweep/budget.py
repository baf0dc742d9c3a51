"""Where a sweep stands with its budget, and the watch that ends it there.

What was spent follows from the ledger alone, so a killed driver forgets at most the last minute. A
trial starts only where what is left covers what it is expected to take; at the limit itself running
trials are interrupted and continue with a larger budget.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.tune.stopper import Stopper

from forge_ray.errors import ConfigError
from forge_ray.sweep.config import BudgetConfig
from forge_ray.sweep.estimate import Estimator, StageTimes, TrialEstimate
from forge_ray.sweep.ledger import Ledger, SweepRecords, TrialRecord
from forge_ray.sweep.prices import cost_of, stage_costs
from forge_ray.sweep.progress import elapsed_s, stage_of
from forge_ray.sweep.searcher import TrialSource, TrialSpec
from forge_ray.sweep.space import Point, label_point

logger = logging.getLogger(__name__)

_BEAT_S, _CHECK_S = 60.0, 1.0
_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class BudgetState:
    """What a sweep has spent and may spend.

    Attributes:
        spent_usd: By the prices of its file, over all sessions.
        spent_hours: Hours that its sessions took together.
        max_cost: Limit in USD, None for none.
        max_hours: Limit in hours, None for none.
        usd_by_stage: Where the money went; `cluster` is what `cluster_hour` adds.
        cluster_hour: USD that an hour of the sweep costs whatever its trials do.
        stopped: The last session's end at the budget: `reason`, `next` (the trials that come
            next, each with `design`, `seconds`, `cost_usd`), `left` (how many); None where it did
            not end so.
    """

    spent_usd: float
    spent_hours: float
    max_cost: float | None
    max_hours: float | None
    usd_by_stage: dict[str, float]
    cluster_hour: float
    stopped: dict[str, Any] | None

    @property
    def left_usd(self) -> float | None:
        """USD that may still be spent; None without a limit."""
        return None if self.max_cost is None else self.max_cost - self.spent_usd

    @property
    def left_s(self) -> float | None:
        """Seconds that the sweep may still run; None without a limit."""
        return None if self.max_hours is None else (self.max_hours - self.spent_hours) * _HOUR_S

    @property
    def spent_reason(self) -> str:
        """Which limit is reached, in words; empty where none is."""
        if self.left_usd is not None and self.left_usd <= 0:
            return f"budget.max_cost: {self.spent_usd:.4g} of {self.max_cost:g} USD are spent"
        if self.left_s is not None and self.left_s <= 0:
            return f"budget.max_hours: {self.spent_hours:.3g} of {self.max_hours:g} hours are over"
        return ""


def budget_state(
    records: SweepRecords, config: BudgetConfig, *, is_running: bool = False
) -> BudgetState:
    """Where a sweep stands; pure but for the clock of a running one.

    Args:
        records: The ledger, folded.
        config: Limits and prices.
        is_running: Whether a driver is alive: its session lasts until now then.
    """
    hours = elapsed_s(records, is_running=is_running) / _HOUR_S
    used = (*records.trials.values(), *records.unstarted())
    costs = [stage_costs(one, config.prices) for one in used]
    by_stage: dict[str, float] = {}
    for cost in costs:
        for stage, value in cost.items():
            by_stage[stage] = by_stage.get(stage, 0.0) + value
    if config.prices.cluster_hour:
        by_stage["cluster"] = hours * config.prices.cluster_hour
    return BudgetState(
        spent_usd=sum(by_stage.values()),
        spent_hours=hours,
        max_cost=config.max_cost,
        max_hours=config.max_hours,
        usd_by_stage=by_stage,
        cluster_hour=config.prices.cluster_hour,
        stopped=records.stopped,
    )


def refusal(state: BudgetState, ahead: TrialEstimate, *, committed_usd: float = 0.0) -> str:
    """Why a trial may not start, in words; empty where it may. Unknown stages refuse nothing.

    Args:
        state: What is spent.
        ahead: What the trial is expected to take.
        committed_usd: What running trials are expected to cost yet.
    """
    if state.spent_reason:
        return state.spent_reason
    # Trials at once share the cluster's hours, which count for the next one alone, as if those that
    # run ended before it: less than will be paid where they outlast it, never more.
    usd = ahead.whole_usd(state.cluster_hour)
    if state.left_usd is not None and usd > state.left_usd - committed_usd:
        return (
            f"budget.max_cost: {state.spent_usd:.4g} of {state.max_cost:g} USD are spent and the "
            f"next trial is expected to cost {usd:.4g}"
        )
    if state.left_s is not None and ahead.seconds > state.left_s:
        return (
            f"budget.max_hours: {state.spent_hours:.3g} of {state.max_hours:g} hours are over and "
            f"the next trial is expected to take {ahead.seconds / _HOUR_S:.3g}"
        )
    return ""


def check_affordable(estimates: Sequence[TrialEstimate], config: BudgetConfig) -> None:
    """Refuses a budget that does not pay for a single trial.

    Raises:
        ConfigError: See above.
    """
    if not estimates:
        return
    usd = min(one.whole_usd(config.prices.cluster_hour) for one in estimates)
    seconds = min(one.seconds for one in estimates)
    if config.max_cost is not None and usd > config.max_cost:
        raise ConfigError(
            f"budget.max_cost must pay for a trial, got {config.max_cost:g} USD for an estimated "
            f"{usd:.4g}. Raise it, or make trials smaller."
        )
    if config.max_hours is not None and seconds > config.max_hours * _HOUR_S:
        raise ConfigError(
            f"budget.max_hours must be enough for a trial, got {config.max_hours:g} for an "
            f"estimated {seconds / _HOUR_S:.3g}. Raise it, or make trials smaller."
        )


class BudgetWatch(Stopper):
    """Keeps a running sweep inside its budget; Tune's stopper at the limit itself.

    Also writes what running trials hold to the ledger every minute (`alive`), between their rows.
    """

    reason: str
    """Why the sweep starts nothing more; empty while it does."""

    def __init__(self, *, ledger: Ledger, config: BudgetConfig, estimator: Estimator) -> None:
        self._ledger, self._config, self._estimator = ledger, config, estimator
        self._has_limit = config.max_cost is not None or config.max_hours is not None
        self._since: dict[str, float] = {}
        self._admitted: dict[str, float] = {}
        self._checked = self._beaten = time.monotonic()
        self.reason = ""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes its stopper with every snapshot, and no snapshot is ever read."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stops no single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether the limit is reached: running trials are interrupted then."""
        now = time.monotonic()
        self.beat_if_due()
        if not self._has_limit or now - self._checked < _CHECK_S:
            return False
        self._checked = now
        reason = self.state().spent_reason
        if reason:
            logger.warning("%s; running trials are interrupted", reason)
            self.reason = reason
            self.beat()
        return bool(reason)

    def may_start(self, waiting: Sequence[TrialEstimate]) -> bool:
        """Whether one of the waiting trials fits; of a drawn one nobody knows yet."""
        state = self.state()
        refusals = [refusal(state, one) for one in waiting or [TrialEstimate()]]
        self.reason = refusals[0] if all(refusals) else ""
        return not self.reason

    def touch(self, key: str) -> None:
        """Notes that the ledger has just heard of a running trial."""
        self._since[key] = time.monotonic()
        self._admitted.pop(key, None)

    def drop(self, key: str) -> None:
        """Notes that a trial ended."""
        self._since.pop(key, None)

    def beat_if_due(self) -> None:
        """Writes what running trials hold, once a minute; also keeps the session's time."""
        if time.monotonic() - self._beaten >= _BEAT_S:
            self.beat()

    def beat(self) -> None:
        """Writes what running trials hold."""
        self._beaten = time.monotonic()
        held, places = {}, {}
        for key, (stage, seconds) in self._pending().items():
            held[key] = {stage: self._trial(key).attempts[-1].get(stage, 0.0) + seconds}
            places[key] = {stage: self._place(key, stage)}
        self._ledger.append("alive", held=held, places=places)
        for key in held:
            self.touch(key)

    @property
    def records(self) -> SweepRecords:
        """The ledger, folded."""
        return self._ledger.follow()

    def state(self) -> BudgetState:
        """Where the sweep stands now, running trials included."""
        state = budget_state(self._ledger.follow(), self._config, is_running=True)
        pending = sum(self._pending_usd(key) for key in self._since)
        return replace(state, spent_usd=state.spent_usd + pending)

    def admits(self, spec: TrialSpec) -> bool:
        """Whether what is left covers a trial, beside what running ones still need."""
        if not self._has_limit:
            return True
        records = self._ledger.follow()
        times = self._estimator.times(records)
        ahead = self._estimator.waiting(times, spec, records)
        self.reason = refusal(self.state(), ahead, committed_usd=self._committed_usd(times))
        if not self.reason:
            # It counts from now on: the next one is asked for before this one has started.
            self._admitted[spec.key] = ahead.cost_usd
        return not self.reason

    def _committed_usd(self, times: StageTimes) -> float:
        committed = sum(self._admitted.values())
        for key in self._since:
            record = self._trial(key)
            ahead = self._estimator.trial(times, record.config, record=record)
            committed += max(0.0, ahead.cost_usd - self._pending_usd(key))
        return committed

    def _pending(self) -> dict[str, tuple[str, float]]:
        """Stage and seconds since the last row, by key of a trial that is in one."""
        now = time.monotonic()
        stages = {key: _STAGES.get(stage_of(self._trial(key))) for key in self._since}
        return {key: (stage, now - self._since[key]) for key, stage in stages.items() if stage}

    def _pending_usd(self, key: str) -> float:
        if key not in (pending := self._pending()):
            return 0.0
        stage, seconds = pending[key]
        record = self._trial(key)
        costs = cost_of(
            {stage: seconds},
            cpus=record.cpus,
            gpus=record.gpus,
            places={stage: self._place(key, stage)},
            prices=self._config.prices,
        )
        return costs[stage]

    def _place(self, key: str, stage: str) -> dict[str, str]:
        """Labels of the node that a stage under way most likely holds.

        Its first row will tell. Until then: where this trial or another one last ran it, else the
        node that costs most.
        """
        record = self._trial(key)
        others = reversed(self._ledger.follow().trials.values())
        known = (one.place(stage) for one in (record, *others))
        held = {"cpus": record.cpus.get(stage, 0.0), "gpus": record.gpus.get(stage, 0.0)}
        return next((one for one in known if one), None) or self._config.prices.dearest(**held)

    def _trial(self, key: str) -> TrialRecord:
        return self._ledger.follow().trials[key]


def stop_event(
    watch: BudgetWatch, estimator: Estimator, cut: Sequence[TrialRecord], source: TrialSource
) -> dict[str, Any]:
    """What the ledger keeps of an end at the budget: see `BudgetState.stopped`.

    Args:
        watch: Knows what is spent, and why nothing starts.
        estimator: Knows what comes next would take.
        cut: Trials that were interrupted.
        source: Trials that wait.
    """
    records, state = watch.records, watch.state()
    waiting = source.unstarted(records.trials)
    times = estimator.times(records)
    rows = [
        _next_row(one.number, one.point, estimator.trial(times, one.config, record=one))
        for one in cut
    ]
    rows += [
        _next_row(one.number, one.point, estimator.waiting(times, one, records)) for one in waiting
    ]
    return {
        "reason": watch.reason,
        "spent_usd": state.spent_usd,
        "spent_hours": state.spent_hours,
        "next": rows[:_SHOWN],
        "left": len(rows) + source.remaining - len(source.queue),
    }


def _next_row(number: int, point: Point, ahead: TrialEstimate) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": number + 1, "design": label_point(point)}
    if not ahead.is_known:
        return row | {"seconds": None, "cost_usd": None}
    return row | {"seconds": round(ahead.seconds, 3), "cost_usd": round(ahead.cost_usd, 6)}


_SHOWN = 5
# By `progress.stage_of`; a trial that is between stages holds nothing.
_STAGES = {"tokenize": "fit", "train": "train", "evaluate": "evaluate"}
