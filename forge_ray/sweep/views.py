"""Rows that people read: the ranking with its floors, the trials and why they ended, the costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forge_ray.sweep.ledger import FinalizeRecord, SweepRecords, TrialRecord
from forge_ray.sweep.space import label_point

STAGES = ("fit", "score", "train", "evaluate")


def ranking_rows(records: SweepRecords, *, metric: str) -> list[dict[str, Any]]:
    """Complete trials and floors, best validation metric first.

    A row's `kind` tells which; `is_tied` says that a trial lies within one standard error of the
    best trial, by the larger of the two errors.
    """
    rows = [
        {
            "kind": "trial",
            "trial": one.number + 1,
            "design": label_point(one.point),
            **_figures(one.final, metric),
            **_proxies(one),
        }
        for one in records.trials.values()
        if one.state == "complete"
    ]
    rows += [
        {"kind": "floor", "trial": None, "design": name, **_figures(metrics, metric)}
        for name, metrics in records.floors.items()
    ]
    rows.sort(key=lambda row: -(row[metric] or 0.0))
    _mark_ties(rows, metric)
    places = iter(range(1, len(rows) + 1))
    return [{"rank": next(places), **row} for row in rows]


def _mark_ties(rows: Sequence[dict[str, Any]], metric: str) -> None:
    trials = [row for row in rows if row["kind"] == "trial"]
    for row in rows:
        errors = [one.get(f"{metric}_se") or 0.0 for one in (row, *trials[:1])]
        row["is_tied"] = row["kind"] == "trial" and (trials[0][metric] or 0.0) - (
            row[metric] or 0.0
        ) <= max(errors)


def trial_rows(
    records: SweepRecords, *, metric: str, is_running: bool = True
) -> list[dict[str, Any]]:
    """Every trial in order of start, with its state and the reason for it."""
    return [
        {
            "trial": one.number + 1,
            "design": label_point(one.point),
            "state": state_of(one, is_running=is_running),
            metric: last_value(one, metric),
            "step": one.history[-1]["global_step"] if one.history else None,
            "seconds": round(sum(one.seconds.values()), 1),
            "reason": one.reason or (one.gate if one.state == "running" else ""),
        }
        for one in sorted(records.trials.values(), key=lambda one: one.number)
    ]


def state_of(record: TrialRecord, *, is_running: bool) -> str:
    """State in words: where a trial was pruned, and whether an open one is alive."""
    if record.state == "pruned":
        place = "before" if record.pruned_by == "gate" else "during"
        return f"pruned {place} training"
    if record.state == "running" and not is_running:
        return "interrupted"
    return record.state


def finalize_rows(record: FinalizeRecord, *, metric: str) -> list[dict[str, Any]]:
    """The winner and the floors on the test split, best first."""
    winner = {"model": f"winner (trial {record.number + 1})", **_figures(record.winner, metric)}
    floors = [
        {"model": name, **_figures(metrics, metric)} for name, metrics in record.floors.items()
    ]
    return sorted([winner, *floors], key=lambda row: -(row[metric] or 0.0))


def cost_rows(records: SweepRecords) -> list[dict[str, Any]]:
    """Wall-clock, CPU and GPU seconds by stage over all trials and designs that were scored."""
    used = [*records.trials.values(), *records.unstarted()]
    rows = []
    for stage in STAGES:
        seconds = [one.seconds.get(stage, 0.0) for one in used]
        cpu = [one.held("CPU").get(stage, 0.0) for one in used]
        gpu = [one.held("GPU").get(stage, 0.0) for one in used]
        rows.append(
            {
                "stage": stage,
                "trials": sum(value > 0 for value in seconds),
                "cached": sum(stage in one.cached for one in used),
                "seconds": round(sum(seconds), 1),
                "CPU seconds": round(sum(cpu), 1),
                "GPU seconds": round(sum(gpu), 1),
            }
        )
    return rows


def counts(records: SweepRecords) -> dict[str, int]:
    """How many trials ended in which way."""
    trials = list(records.trials.values())
    return {
        "trials": len(trials),
        "complete": sum(one.state == "complete" for one in trials),
        "pruned before training": sum(one.pruned_by == "gate" for one in trials),
        "pruned during training": sum(one.pruned_by == "asha" for one in trials),
        "failed": sum(one.state == "failed" for one in trials),
        "open": sum(one.state == "running" for one in trials),
    }


def _figures(metrics: Mapping[str, Any], metric: str) -> dict[str, Any]:
    cut = metric.rpartition("@")[2]
    hit = f"ItemHit@{cut}"
    names = dict.fromkeys((metric, f"{metric}_se", hit, f"{hit}_se", f"{hit}/head", f"{hit}/tail"))
    return {name: metrics.get(name) for name in (*names, f"SidHit@{cut}", f"coverage@{cut}")}


def _proxies(record: TrialRecord) -> dict[str, Any]:
    names = ("backoff_bits", "uniqueness", "embedding_hitrate")
    return {name: record.proxies.get(name) for name in names}


def last_value(record: TrialRecord, metric: str) -> float | None:
    """The final metric, or the last one that training reported."""
    if record.value is not None:
        return record.value
    value = record.history[-1].get(metric) if record.history else None
    return None if value is None else float(value)
