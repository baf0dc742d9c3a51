"""A running sweep's figures for a metrics server, through Ray, beside the sweep.

Everything follows from the ledger, as it does for trackers, so a sweep that continues shows its
whole past at once. Ray exports a gauge for seconds after it was last set: the exporter sets all of
them again and again, and they are gone soon after the driver. Tags are few and closed: sweep,
stage, state, reason and the names of proxies and metrics, never a hyper-parameter.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from forge_ray.sweep.budget import BudgetState, budget_state
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import SweepRecords, TrialRecord
from forge_ray.sweep.progress import PROXIES
from forge_ray.sweep.spending import ending_of
from forge_ray.sweep.tail import LedgerTail
from forge_ray.sweep.views import STAGES

logger = logging.getLogger(__name__)

_POLL_S = 5.0
"""Seconds between two exports; Ray passes a gauge on every 10 seconds if it was set since."""

_CLOSE_S = 10.0


@dataclass(frozen=True)
class Gauge:
    """A figure: its description and the tags it has beside `sweep`."""

    text: str
    tags: tuple[str, ...] = ()


GAUGES: Mapping[str, Gauge] = {
    "forge_trials": Gauge("Trials by state and by reason of their pruning.", ("state", "reason")),
    "forge_incumbent_proxy": Gauge("Proxies of the best complete trial.", ("proxy",)),
    "forge_best_metric": Gauge("The sweep's metric of the best complete trial.", ("metric",)),
    "forge_stage_seconds": Gauge("Seconds of all trials by stage.", ("stage",)),
    "forge_cost_usd": Gauge("USD spent by stage; `cluster` is the cluster's own.", ("stage",)),
    "forge_budget_share": Gauge("Share of the budget that is spent, by limit.", ("limit",)),
    "forge_progress_timestamp_seconds": Gauge("When a trial last started, reported or ended."),
    "forge_nodes_lost": Gauge("Nodes that died or were preempted this session.", ("reason",)),
}
"""Gauges of a sweep, tag `sweep` and those named; Ray exports them as `ray_<name>`."""

_PRUNED = {"too few SIDs": "infeasible", "hard limits": "limits", "proxy gate": "gate"}
_HALVING = "halving"
_SHOWN = (*PROXIES, "backoff_gain", "gini", "usage_min")
# Ray's numbers for how a node went; those left out were meant to go.
_LOST = {2: "died", 3: "preempted"}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One value of a gauge.

    Attributes:
        name: Of the gauge.
        value: Finite.
        tags: Beside `sweep`.
    """

    name: str
    value: float
    tags: dict[str, str]


def readings(records: SweepRecords, config: SweepConfig, *, progressed: float) -> list[Reading]:
    """The figures of a running sweep; those that are not known yet are left out.

    Args:
        records: The ledger, folded.
        config: The sweep file.
        progressed: Time of the last news of a trial, as `time.time()`.
    """
    state = budget_state(records, config.budget, is_running=True)
    found = [
        *_trials(records, config),
        *_incumbent(records.winner(), config.metric),
        *_spent(records, state),
        _reading("forge_progress_timestamp_seconds", progressed),
    ]
    return [one for one in found if math.isfinite(one.value)]


def _reading(name: str, value: float, **tags: str) -> Reading:
    return Reading(name=name, value=float(value), tags=tags)


def _trials(records: SweepRecords, config: SweepConfig) -> list[Reading]:
    trials = records.trials.values()
    # Nothing is said as 0, or a graph would begin with the first trial of its kind.
    counted = Counter(
        {
            ("waiting", ""): max(0, records.planned - len(trials)),
            **dict.fromkeys((("running", ""), ("complete", ""), ("failed", "")), 0),
            **{("pruned", reason): 0 for reason in (*_PRUNED.values(), _HALVING)},
        }
    )
    for one in trials:
        reason = _PRUNED.get(ending_of(one, config.gate), _HALVING)
        counted[one.state, reason if one.state == "pruned" else ""] += 1
    return [
        _reading("forge_trials", count, state=state, reason=reason)
        for (state, reason), count in counted.items()
    ]


def _incumbent(winner: TrialRecord | None, metric: str) -> list[Reading]:
    if winner is None or winner.value is None:
        return []
    proxies = {name: winner.proxies.get(name) for name in _SHOWN}
    return [
        _reading("forge_best_metric", winner.value, metric=metric),
        *(
            _reading("forge_incumbent_proxy", value, proxy=name)
            for name, value in proxies.items()
            if value is not None
        ),
    ]


def _spent(records: SweepRecords, state: BudgetState) -> list[Reading]:
    seconds = dict.fromkeys(STAGES, 0.0)
    for one in (*records.trials.values(), *records.unstarted()):
        for stage, value in one.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    found = [
        _reading("forge_stage_seconds", value, stage=stage) for stage, value in seconds.items()
    ]
    costs = dict.fromkeys(STAGES, 0.0) | state.usd_by_stage
    found += [_reading("forge_cost_usd", value, stage=stage) for stage, value in costs.items()]
    limits = {
        "cost": (state.spent_usd, state.max_cost),
        "hours": (state.spent_hours, state.max_hours),
    }
    return found + [
        _reading("forge_budget_share", spent / limit, limit=name)
        for name, (spent, limit) in limits.items()
        if limit
    ]


def lost_nodes(nodes: Sequence[Mapping[str, Any]], *, before: frozenset[str]) -> list[Reading]:
    """Nodes that went unasked, by how they went.

    Args:
        nodes: As `ray.nodes()` has them.
        before: Ids of those that were gone when the session began.
    """
    gone = [one for one in nodes if not one["Alive"] and one["NodeID"] not in before]
    counted = Counter(_LOST.get(one["DeathReason"]) for one in gone)
    return [
        _reading("forge_nodes_lost", counted[reason], reason=reason) for reason in _LOST.values()
    ]


class MetricsExporter:
    """Sets a sweep's gauges from its ledger, again and again, in a thread of its own.

    Args:
        config: The sweep file.
        folder: The sweep's folder.
    """

    def __init__(self, config: SweepConfig, folder: Path) -> None:
        from ray.util import metrics

        self._config = config
        self._tail = LedgerTail(folder)
        self._progressed = time.time()
        self._gauges: dict[str, Any] = {
            name: metrics.Gauge(name, description=one.text, tag_keys=("sweep", *one.tags))
            for name, one in GAUGES.items()
        }
        self._gone_before = frozenset(_dead_nodes())
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Begins to export."""
        self._thread.start()

    def close(self) -> None:
        """Exports once more and ends; a cluster that does not answer is not waited for."""
        self._closing.set()
        self._thread.join(_CLOSE_S)

    def export(self) -> None:
        """Sets every gauge that is known now."""
        if self._tail.poll():
            self._progressed = time.time()
        found = readings(self._tail.records, self._config, progressed=self._progressed)
        found += lost_nodes(ray.nodes(), before=self._gone_before)
        for one in found:
            self._gauges[one.name].set(one.value, tags={"sweep": self._config.name, **one.tags})

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.is_set()
            try:
                self.export()
            except (OSError, RayError) as error:
                # A disk or a cluster that stays away ends the sweep itself, which says so.
                logger.debug("metrics: cannot be read now", exc_info=error)
            if not is_last:
                self._closing.wait(_POLL_S)


def _dead_nodes() -> Iterator[str]:
    return (one["NodeID"] for one in ray.nodes() if not one["Alive"])


@contextmanager
def exporting(config: SweepConfig, folder: Path) -> Iterator[None]:
    """Exports a sweep's figures for the length of a block; Ray must be up."""
    exporter = MetricsExporter(config, folder)
    exporter.start()
    try:
        yield
    finally:
        exporter.close()
