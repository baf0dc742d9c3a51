"""The report's figures as HTML fragments; the page brings plotly.js once.

Names reach plotly as text, but plotly reads some tags in labels, so they are escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from forge_ray.sid.metrics.registry import METRICS
from forge_ray.sweep.audit import ProxyAudit
from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.space import label_point
from forge_ray.sweep.views import STAGES

_COLORS = {"complete": "#1f6f54", "asha": "#d98e04", "gate": "#b3382c", "other": "#7a7f87"}
_STAGE_COLORS = dict(zip(STAGES, ("#8fb8de", "#5b8fc9", "#1f6f54", "#b5d3c5"), strict=True))
_LABELS = {"complete": "complete", "asha": "pruned during training", "gate": "pruned by the gate"}


def learning_curves(records: Sequence[TrialRecord], *, metric: str) -> str:
    """Validation metric by optimizer step, one line per trained trial."""
    figure = go.Figure()
    for record in (one for one in records if one.history):
        color = _COLORS["complete" if record.state == "complete" else record.pruned_by or "other"]
        figure.add_scatter(
            x=[row["global_step"] for row in record.history],
            y=[row.get(metric) for row in record.history],
            mode="lines+markers",
            name=f"trial {record.number + 1}",
            line={"color": color, "width": 2, "shape": "linear"},
            marker={"size": 6},
            hovertemplate=f"{_name(record)}<br>step %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    return _html(figure, x="optimizer step", y=f"validation {metric}", height=420)


def proxy_scatter(records: Sequence[TrialRecord], found: ProxyAudit, *, metric: str) -> str:
    """One proxy against the final metric; pruned trials that trained stand at their last value."""
    figure = go.Figure()
    for kind in ("complete", "asha"):
        points = [
            (one, one.proxies.get(found.proxy), _value(one, metric))
            for one in records
            if (one.state == "complete" if kind == "complete" else one.pruned_by == "asha")
        ]
        shown = [(one, x, y) for one, x, y in points if x is not None and y is not None]
        figure.add_scatter(
            x=[x for _, x, _ in shown],
            y=[y for _, _, y in shown],
            mode="markers",
            name=_LABELS[kind],
            marker={
                "color": _COLORS[kind],
                "size": 10,
                "symbol": "circle" if kind == "complete" else "circle-open",
            },
            text=[_name(one) for one, _, _ in shown],
            hovertemplate="%{text}<br>%{x:.4g} → %{y:.4f}<extra></extra>",
        )
    better = f"{METRICS[found.proxy].better} is better"
    title = f"{found.proxy}: Spearman {found.spearman}, n = {found.num_trials}"
    return _html(figure, x=f"{found.proxy} ({better})", y=metric, height=340, title=title)


def stage_seconds(records: Sequence[TrialRecord]) -> str:
    """Seconds of each stage, stacked per trial."""
    figure = go.Figure()
    for stage in STAGES:
        figure.add_bar(
            y=[f"trial {one.number + 1}" for one in records],
            x=[one.seconds.get(stage, 0.0) for one in records],
            name=stage,
            orientation="h",
            marker={"color": _STAGE_COLORS[stage]},
            text=[_name(one) for one in records],
            textposition="none",
            hovertemplate=f"%{{text}}<br>{stage} %{{x:.1f}} s<extra></extra>",
        )
    figure.update_layout(barmode="stack", yaxis={"autorange": "reversed"})
    return _html(figure, x="seconds", y="", height=max(220, 90 + 26 * len(records)))


def _value(record: TrialRecord, metric: str) -> float | None:
    if record.value is not None:
        return record.value
    value = record.history[-1].get(metric) if record.history else None
    return None if value is None else float(value)


def _name(record: TrialRecord) -> str:
    return html.escape(f"trial {record.number + 1}: {label_point(record.point)}")


def _html(figure: go.Figure, *, x: str, y: str, height: int, title: str = "") -> str:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 44 if title else 16, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
        title={"text": title, "font": {"size": 14}} if title else None,
        legend={"orientation": "h", "y": -0.2},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(title=x, automargin=True)
    figure.update_yaxes(title=y, automargin=True)
    options = {"displayModeBar": False, "responsive": True}
    return str(
        figure.to_html(
            full_html=False, include_plotlyjs=False, config=options, default_width="100%"
        )
    )
