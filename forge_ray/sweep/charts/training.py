"""Figures about training: learning curves, and proxies against what training found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import plotly.graph_objects as go
from markupsafe import Markup

from forge_ray.sid.metrics.registry import METRICS
from forge_ray.sweep.audit import ProxyAudit
from forge_ray.sweep.charts.figure import (
    AMBER,
    BLUE,
    GRAY,
    GREEN,
    RED,
    SCALE,
    capped,
    drawn_of,
    fragment,
    name_of,
)
from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.views import last_value

_DASHES = ("dot", "dash", "dashdot", "longdash")
_SYMBOLS = ("circle-open", "square-open", "diamond-open", "triangle-up-open")
_RUNG_COLORS = (SCALE[0][1], BLUE, SCALE[1][1], AMBER)


def learning_curves(records: Sequence[TrialRecord], *, metric: str, asha: AshaConfig) -> Markup:
    """Validation metric by optimizer step, coloured by the last rung that a trial reached."""
    trained = [one for one in records if one.history]
    ranked = sorted(trained, key=lambda one: last_value(one, metric) or 0.0, reverse=True)
    shown = capped(trained, ranked)
    figure = go.Figure()
    groups: dict[str, list[TrialRecord]] = defaultdict(list)
    for one in shown:
        groups[_reached(one, asha)].append(one)
    for place, label in enumerate(sorted(groups, key=_order)):
        # Styles repeat from the fifth rung on; the legend's and the hover's words do not.
        style = {
            "complete": (GREEN, "solid", "circle"),
            "failed": (RED, "dot", "x"),
            "under way": (GRAY, "solid", "circle-open"),
        }.get(
            label,
            (
                _RUNG_COLORS[place % len(_RUNG_COLORS)],
                _DASHES[place % len(_DASHES)],
                _SYMBOLS[place % len(_SYMBOLS)],
            ),
        )
        _add_curves(figure, groups[label], label=label, style=style, metric=metric)
    says = (
        f"Validation {metric} by optimizer step of {len(trained)} trained trials, on the "
        "training's sample of users; colour, dash and marker tell the last rung that a trial "
        "reached." + drawn_of(len(shown), len(trained))
    )
    return fragment(figure, says=says, x="optimizer step", y=metric, height=440)


def _add_curves(
    figure: go.Figure,
    group: Sequence[TrialRecord],
    *,
    label: str,
    style: tuple[str, str, str],
    metric: str,
) -> None:
    """All curves of a group as one trace: a gap between two of them."""
    x: list[int | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for one in group:
        x += [*(row["global_step"] for row in one.history), None]
        y += [*(row.get(metric) for row in one.history), None]
        text += [name_of(one)] * (len(one.history) + 1)
    color, dash, symbol = style
    figure.add_scatter(
        x=x,
        y=y,
        text=text,
        mode="lines+markers",
        name=f"{label} ({len(group)})",
        line={"color": color, "width": 1.2 if label == "complete" else 2, "dash": dash},
        marker={"size": 6, "symbol": symbol},
        hovertemplate="%{text}<br>step %{x}: %{y:.4f}<extra></extra>",
    )


def _reached(record: TrialRecord, asha: AshaConfig) -> str:
    if record.state in ("complete", "failed"):
        return record.state
    if record.pruned_by != "asha":
        return "under way"
    step = record.history[-1]["global_step"]
    # The trial's own: while the sweep runs nobody may have come to the last step yet.
    milestones = asha.milestones(record.config["gr"]["max_steps"])
    place = sum(one <= step for one in milestones)
    return f"stopped at rung {place} (step {step})"


def _order(label: str) -> tuple[int, int]:
    is_rung = label.startswith("stopped")
    step = int(label.rpartition(" ")[2].rstrip(")")) if is_rung else 0
    return (1 if is_rung else 0, step)


def proxy_scatter(
    records: Sequence[TrialRecord], found: ProxyAudit, *, metric: str, early_step: int | None
) -> Markup:
    """One proxy against the metric; pruned trials that trained stand at their last value.

    Args:
        records: All trials.
        found: The proxy and its correlation.
        metric: Validation metric.
        early_step: The step whose metric the correlation is with; None is the final one.
    """
    figure = go.Figure()
    styles = {
        "complete": (GREEN, "circle"),
        "control, complete": (BLUE, "diamond"),
        "stopped by halving": (AMBER, "circle-open"),
    }
    for kind, (color, symbol) in styles.items():
        points = [
            (one, one.proxies.get(found.proxy), last_value(one, metric))
            for one in records
            if _kind(one) == kind
        ]
        known = [(one, x, y) for one, x, y in points if x is not None and y is not None]
        if not known:
            continue
        figure.add_scatter(
            x=[x for _, x, _ in known],
            y=[y for _, _, y in known],
            mode="markers",
            name=kind,
            marker={"color": color, "size": 9, "symbol": symbol, "line": {"width": 1.5}},
            text=[name_of(one) for one, _, _ in known],
            hovertemplate="%{text}<br>%{x:.4g} → %{y:.4f}<extra></extra>",
        )
    better = f"{METRICS[found.proxy].better} is better"
    says = (
        f"{found.verdict}: Spearman {found.spearman} over {_compared(found, early_step)}, "
        f"Kendall {found.correlation.kendall}; 90 % intervals."
    )
    if early_step is not None:
        says += " Points stand at their last value."
    elif any(_kind(one) == "stopped by halving" for one in records):
        says += " Trials stopped by halving stand at their last value and are not in it."
    figure.update_layout(showlegend=True)
    return fragment(
        figure, says=says, x=f"{found.proxy} ({better})", y=metric, height=320, title=found.proxy
    )


def _compared(found: ProxyAudit, early_step: int | None) -> str:
    if early_step is None:
        return f"{found.num_trials} complete trials"
    return f"{found.num_trials} trained trials at step {early_step} (none is complete)"


def _kind(record: TrialRecord) -> str:
    if record.state == "complete":
        return "control, complete" if record.is_control else "complete"
    return "stopped by halving" if record.pruned_by == "asha" else ""
