"""A sweep as someone watching it wants to see it: where each trial stands, and the best so far.

Knows the ledger's records alone: it works beside a running sweep, after it, and on another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from forge_ray.sweep.ledger import SweepRecords, TrialRecord
from forge_ray.sweep.space import label_point
from forge_ray.sweep.views import counts, trial_rows

PROXIES = ("backoff_bits", "uniqueness", "embedding_hitrate")
"""Proxies that a watcher sees."""

_BEST, _ENDED = 5, 8
_ALL_BELOW = 25


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a sweep at one moment.

    Attributes:
        is_running: Whether a driver is alive.
        counts: How many trials ended in which way.
        planned: Trials of the whole sweep, at most.
        elapsed_s: Seconds that its sessions took together.
        best: The best complete trial: `trial`, `design`, `value`, `error`; None before the first.
        dashboard: The dashboard of the Ray that runs the sweep; empty where none does.
        trials: One row per trial in order of start; see `trial_progress`.
    """

    is_running: bool
    counts: dict[str, int]
    planned: int
    elapsed_s: float
    best: dict[str, Any] | None
    dashboard: str
    trials: list[dict[str, Any]]


def progress(records: SweepRecords, *, metric: str, is_running: bool) -> Progress:
    """What a watcher sees of these records."""
    rows = trial_rows(records, metric=metric, is_running=is_running)
    trials = sorted(records.trials.values(), key=lambda one: one.number)
    return Progress(
        is_running=is_running,
        counts=counts(records),
        planned=records.planned,
        elapsed_s=elapsed_s(records, is_running=is_running),
        best=_best(records, metric),
        dashboard=records.dashboard if is_running else "",
        trials=[
            row | trial_progress(one, metric=metric) for row, one in zip(rows, trials, strict=True)
        ],
    )


def trial_progress(record: TrialRecord, *, metric: str) -> dict[str, Any]:
    """Where a trial stands: stage, proxies, best value of the metric so far, time of its end."""
    values = [row[metric] for row in record.history if row.get(metric) is not None]
    final = [record.value] if record.value is not None else []
    return {
        "stage": stage_of(record),
        "best": max([*values, *final], default=None),
        **{name: record.proxies.get(name) for name in PROXIES},
        "ended": record.ended,
    }


def stage_of(record: TrialRecord) -> str:
    """The stage in progress, or the one that a trial ended in."""
    if record.state == "complete" or record.final:
        return "done"
    if record.pruned_by == "gate":
        return "gate"
    if not record.proxies:
        return "tokenize"
    last = record.history[-1]["global_step"] if record.history else 0
    whole = record.config.get("gr", {}).get("max_steps")
    return "evaluate" if whole and last >= whole and record.state == "running" else "train"


def elapsed_s(records: SweepRecords, *, is_running: bool, at: datetime | None = None) -> float:
    """Seconds of all sessions; the one that runs lasts until now.

    Args:
        records: The ledger, folded.
        is_running: Whether the last session goes on.
        at: The time it is; None asks the clock.
    """
    spans = [tuple(datetime.fromisoformat(one) for one in span) for span in records.spans]
    if spans and is_running:
        spans[-1] = (spans[-1][0], at or datetime.now(timezone.utc))
    return sum((last - first).total_seconds() for first, last in spans)


def interesting(rows: Sequence[dict[str, Any]], *, metric: str) -> list[dict[str, Any]]:
    """Of many trials those worth a line: running, best, and last ended; few are shown whole."""
    if len(rows) <= _ALL_BELOW:
        return list(rows)
    complete = [row for row in rows if row["state"] == "complete"]
    best = sorted(complete, key=lambda row: -row[metric])[:_BEST]
    ended = sorted((row for row in rows if row["ended"]), key=lambda row: row["ended"])[-_ENDED:]
    running = [row for row in rows if row["state"] == "running"]
    wanted = {row["trial"] for row in (*running, *best, *ended)}
    return [row for row in rows if row["trial"] in wanted]


def _best(records: SweepRecords, metric: str) -> dict[str, Any] | None:
    winner = records.winner()
    if winner is None:
        return None
    return {
        "trial": winner.number + 1,
        "design": label_point(winner.point),
        "value": winner.value,
        "error": winner.final.get(f"{metric}_se"),
    }
