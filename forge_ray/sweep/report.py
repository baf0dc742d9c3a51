"""One self-contained HTML file about a sweep: what won, why the rest ended, what it cost."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from forge_ray.config import to_yaml
from forge_ray.sweep.audit import Audit, audit
from forge_ray.sweep.charts import learning_curves, proxy_scatter, stage_seconds
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import SweepRecords, TrialRecord, now
from forge_ray.sweep.space import label_point
from forge_ray.sweep.views import cost_rows, counts, finalize_rows, ranking_rows, trial_rows

_MAX_SCATTERS = 4


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
    template = environment.get_template("report.html.j2")
    return template.render(**_content(records, config, is_running=is_running))


def _content(records: SweepRecords, config: SweepConfig, *, is_running: bool) -> dict[str, Any]:
    metric = config.metric
    trials = sorted(records.trials.values(), key=lambda one: one.number)
    rows = trial_rows(records, metric=metric, is_running=is_running)
    found = audit(trials, metric=metric)
    final = records.finalized[-1] if records.finalized else None
    winner = records.winner()
    return {
        "name": config.name,
        "metric": metric,
        "hit": f"ItemHit@{metric.rpartition('@')[2]}",
        "cut": metric.rpartition("@")[2],
        "written": now(),
        "is_running": is_running,
        "counts": counts(records),
        "ranking": ranking_rows(records, metric=metric),
        "rows": rows,
        "by_gate": [_with_proxies(one) for one in trials if one.pruned_by == "gate"],
        "test": finalize_rows(final, metric=metric) if final else [],
        "test_uses": len(records.finalized),
        "is_stale": bool(final and winner and final.key != winner.key),
        "winner": winner,
        "winner_yaml": _yaml(winner.config) if winner else "",
        "audit": found,
        "costs": cost_rows(records),
        "sweep_yaml": to_yaml(config),
        "plotly": Markup(get_plotlyjs()),
        **_charts(trials, found, metric=metric),
    }


def _charts(trials: Sequence[TrialRecord], found: Audit, *, metric: str) -> dict[str, Any]:
    """Figures as markup; plotly's writer escapes what goes into its script."""
    drawn = [one for one in found.final or found.early if not math.isnan(one.spearman.value)]
    has_history = any(one.history for one in trials)
    return {
        "curves": Markup(learning_curves(trials, metric=metric)) if has_history else "",
        "scatters": [
            Markup(proxy_scatter(trials, one, metric=metric)) for one in drawn[:_MAX_SCATTERS]
        ],
        "stages": Markup(stage_seconds(trials)) if trials else "",
    }


def _with_proxies(record: TrialRecord) -> dict[str, Any]:
    return {
        "trial": record.number + 1,
        "design": label_point(record.point),
        "reason": record.reason,
        "proxies": record.proxies,
    }


def _yaml(content: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(content), sort_keys=False))


def _figure(value: Any, digits: int = 4) -> str:
    """A number for a cell; a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
