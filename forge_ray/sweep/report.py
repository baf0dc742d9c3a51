"""One self-contained HTML file about a sweep: what won, why the rest ended, what it cost."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from forge_ray.config import to_yaml
from forge_ray.secrets import masked, masked_words
from forge_ray.sweep.audit import Audit, audit
from forge_ray.sweep.charts.space import importance_bars, parallel_coordinates, pareto_scatter
from forge_ray.sweep.charts.spending import stage_seconds, use_over_time, waterfall_bars
from forge_ray.sweep.charts.training import learning_curves, proxy_scatter
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.importance import importances
from forge_ray.sweep.ledger import SweepRecords, TrialRecord, now
from forge_ray.sweep.objectives import FACTS
from forge_ray.sweep.space import label_point
from forge_ray.sweep.spending import reuse, timeline, unit_of, waterfall
from forge_ray.sweep.views import (
    cost_rows,
    counts,
    finalize_rows,
    ranking_rows,
    trial_rows,
)

_MAX_ROWS = 300
"""Rows of a table of trials; the ledger and `sweep status --all --json` have every one."""


def write_report(
    path: Path, records: SweepRecords, config: SweepConfig, *, is_running: bool
) -> None:
    """Writes the report atomically.

    Args:
        path: Target file.
        records: The ledger, folded; may be empty.
        config: The sweep file.
        is_running: Whether a driver is alive: open trials are running, not interrupted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(render_report(records, config, is_running=is_running), encoding="utf-8")
    partial.replace(path)


def render_report(records: SweepRecords, config: SweepConfig, *, is_running: bool) -> str:
    """The report as HTML; everything that comes from data is escaped."""
    environment = Environment(
        loader=PackageLoader("forge_ray.sweep", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    environment.filters["usd"] = _usd
    template = environment.get_template("report.html.j2")
    return template.render(**_content(records, config, is_running=is_running))


def _content(records: SweepRecords, config: SweepConfig, *, is_running: bool) -> dict[str, Any]:
    metric = config.metric
    trials = sorted(records.trials.values(), key=lambda one: one.number)
    rows = trial_rows(records, metric=metric, is_running=is_running)
    ranking = ranking_rows(records, metric=metric)
    by_gate = [one for one in trials if one.pruned_by == "gate"]
    found = audit(trials, metric=metric, unstarted=records.unstarted())
    final = records.finalized[-1] if records.finalized else None
    winner = records.winner()
    return {
        "name": config.name,
        "metric": metric,
        "hit": f"ItemHit@{metric.rpartition('@')[2]}",
        "cut": metric.rpartition("@")[2],
        "written": now()[:19].replace("T", " ") + " UTC",
        "is_running": is_running,
        "planned": max(records.planned, len(trials)),
        "counts": counts(records),
        "ranking": _cut_ranking(ranking),
        "num_ranked": len(ranking),
        "rows": rows[:_MAX_ROWS],
        "num_rows": len(rows),
        "by_gate": [_with_proxies(one) for one in by_gate[:_MAX_ROWS]],
        "num_by_gate": len(by_gate),
        "test": finalize_rows(final, metric=metric) if final else [],
        "test_uses": len(records.finalized),
        "is_stale": bool(final and winner and final.key != winner.key),
        "winner": winner,
        "winner_yaml": _yaml(winner.config) if winner else "",
        "audit": found,
        "costs": cost_rows(records),
        "reuse": reuse(trials),
        "environment": _environment_rows(records.environment),
        "command": shlex.join(masked_words(records.command)),
        "sweep_yaml": masked(to_yaml(config)),
        "plotly": Markup(get_plotlyjs()),
        **_spent(records, trials, config),
        **_charts(trials, found, config),
    }


def _cut_ranking(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best rows and every floor, which is what the rest is measured against."""
    return [row for place, row in enumerate(rows) if place < _MAX_ROWS or row["kind"] == "floor"]


def _spent(
    records: SweepRecords, trials: Sequence[TrialRecord], config: SweepConfig
) -> dict[str, Any]:
    unit = unit_of(trials, config.budget.prices)
    removed = waterfall(records, config.gate, unit)
    used = timeline(records, unit)
    planned = max(records.planned, len(trials))
    return {
        "unit": unit.name,
        "removed": removed,
        "total_used": used.total,
        "budget": config.budget,
        "stopped": records.stopped,
        "hours": used.hours[-1],
        "waterfall": waterfall_bars(removed, planned=planned) if planned else "",
        "use": use_over_time(used, unit, config.budget) if used.total else "",
    }


def _charts(trials: Sequence[TrialRecord], found: Audit, config: SweepConfig) -> dict[str, Any]:
    """Figures as markup; plotly's writer escapes what goes into its script."""
    metric = config.metric
    drawn = [one for one in found.final or found.early if not math.isnan(one.spearman.value)]
    trained = [one for one in trials if one.history]
    early_step = None if found.final else found.early_step
    shares = importances(trials)
    has_bars = any(sum(one.seconds.values()) for one in trials)
    return {
        "curves": learning_curves(trained, metric=metric, asha=config.asha) if trained else "",
        "scatters": [
            proxy_scatter(trials, one, metric=metric, early_step=early_step) for one in drawn
        ],
        "parallel": parallel_coordinates(trials, metric=metric),
        "importance": importance_bars(
            shares, num_trials=sum(one.state == "complete" for one in trials), metric=metric
        )
        if shares
        else "",
        "fronts": _fronts(trials, config),
        "stages": stage_seconds(trials) if has_bars else "",
    }


def _fronts(trials: Sequence[TrialRecord], config: SweepConfig) -> list[Markup]:
    """The metric against the sweep's other objectives, else against SID size and compute."""
    has_gpu = any(value > 0 for one in trials for value in one.gpus.values())
    usual = [*FACTS, "gpu_seconds" if has_gpu else "cpu_seconds"]
    others = config.objectives[1:] or usual
    found = [
        pareto_scatter(trials, metric=config.metric, other=other, prices=config.budget.prices)
        for other in others
    ]
    return [one for one in found if one is not None]


def _with_proxies(record: TrialRecord) -> dict[str, Any]:
    return {
        "trial": record.number + 1,
        "design": label_point(record.point),
        "reason": record.reason,
        "proxies": record.proxies,
    }


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value for the page; what is unknown is left out."""
    known = {**environment, "cluster": _cluster(environment.get("cluster") or {})}
    return [(name, str(value)) for name, value in known.items() if value]


def _cluster(resources: Mapping[str, float]) -> str:
    parts = [
        f"memory {value / 2**30:.1f} GiB" if name == "memory" else f"{name} {value:g}"
        for name, value in resources.items()
    ]
    return ", ".join(parts)


def _yaml(content: Mapping[str, Any]) -> str:
    return masked(str(yaml.safe_dump(dict(content), sort_keys=False)))


def _usd(value: float) -> str:
    """Money for people: cents, or two digits where there are not that many."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _figure(value: Any, digits: int = 4) -> str:
    """A number for a cell; a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
