"""Figures about the space: parameters beside the metric, their importance, the Pareto front."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from forge_ray.sweep.charts.figure import (
    BLUE,
    GRAY,
    GREEN,
    SCALE,
    capped,
    drawn_of,
    fragment,
    name_of,
)
from forge_ray.sweep.importance import CAUTION_BELOW, Importance
from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.objectives import direction, objective_values, pareto_front
from forge_ray.sweep.prices import Prices
from forge_ray.sweep.views import last_value

_MAX_AXES, _MAX_TICKS, _TICK_LENGTH = 12, 7, 16
_MISSING = "(none)"


def parallel_coordinates(records: Sequence[TrialRecord], *, metric: str) -> Markup | None:
    """One line per trained trial through its parameters to its metric; None if nothing varies."""
    valued = [(one, last_value(one, metric)) for one in records]
    trained = sorted(
        ((one, value) for one, value in valued if value is not None), key=lambda pair: -pair[1]
    )
    ranked = [one for one, _ in trained]
    names = [
        name
        for name in dict.fromkeys(name for one in ranked for name in one.point)
        if len({json.dumps(one.point.get(name)) for one in ranked}) > 1
    ]
    if not names or len(ranked) < 2:
        return None
    shown = capped(ranked, ranked)
    values = {one.key: value for one, value in trained}
    metric_values = [values[one.key] for one in shown]
    figure = go.Figure()
    figure.add_parcoords(
        line={
            "color": metric_values,
            "colorscale": [list(one) for one in SCALE],
            "showscale": False,
        },
        dimensions=[
            *(_axis(name, [one.point.get(name) for one in shown]) for name in names[:_MAX_AXES]),
            {"label": html.escape(metric), "values": metric_values, "tickformat": ".3f"},
        ],
        labelangle=-18,
        labelside="top",
    )
    axes = min(len(names), _MAX_AXES) + 1
    left_out = f" Left out: {', '.join(names[_MAX_AXES:])}." if len(names) > _MAX_AXES else ""
    says = (
        f"Parameters of {len(ranked)} trained trials, from left to right in the order of the "
        f"space, to their last {metric} on the right (violet low, amber high). {_MISSING}: the "
        "parameter does not exist in that design. Drag along an axis to select."
        + left_out
        + drawn_of(len(shown), len(ranked))
    )
    return fragment(figure, says=says, height=480, width=max(320, 132 * axes), margin=(100, 88))


def _axis(name: str, values: Sequence[Any]) -> dict[str, Any]:
    label = _axis_name(name)
    distinct = sorted({json.dumps(one) for one in values if one is not None}, key=_tick_order)
    has_missing = any(one is None for one in values)
    is_numeric = all(isinstance(one, (int, float)) for one in values if one is not None)
    if is_numeric and len(distinct) > _MAX_TICKS:
        return _number_axis(label, values, has_missing=has_missing)
    ticks = [_MISSING] * has_missing + [_short(one) for one in distinct]
    places = {text: place + has_missing for place, text in enumerate(distinct)}
    return {
        "label": label,
        "values": [0 if one is None else places[json.dumps(one)] for one in values],
        "tickvals": list(range(len(ticks))),
        "ticktext": ticks,
        "range": [-0.2, len(ticks) - 0.8],
    }


def _axis_name(name: str) -> str:
    return html.escape(".".join(name.split(".")[-2:]))


def _number_axis(label: str, values: Sequence[Any], *, has_missing: bool) -> dict[str, Any]:
    numbers = [float(one) for one in values if one is not None]
    low, high = min(numbers), max(numbers)
    floor = low - 0.15 * (high - low)
    ticks = [low + (high - low) * step / 4 for step in range(5)]
    return {
        "label": label,
        "values": [floor if one is None else float(one) for one in values],
        "tickvals": [floor] * has_missing + ticks,
        "ticktext": [_MISSING] * has_missing + [f"{one:.3g}" for one in ticks],
        "range": [floor if has_missing else low, high],
    }


def _tick_order(text: str) -> tuple[int, float, str]:
    value = json.loads(text)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, value, "") if is_number else (1, 0.0, text)


def _short(text: str) -> str:
    value = json.loads(text)
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    cut = shown if len(shown) <= _TICK_LENGTH else f"{shown[: _TICK_LENGTH - 1]}…"
    return html.escape(cut)


def importance_bars(found: Sequence[Importance], *, num_trials: int, metric: str) -> Markup:
    """Share of the metric's variance that goes along with each parameter."""
    shown = list(found[:_MAX_AXES])
    figure = go.Figure()
    figure.add_bar(
        y=[_axis_name(one.name) for one in shown],
        x=[one.share for one in shown],
        orientation="h",
        marker={"color": BLUE},
        text=[f"{one.share:.0%} · n = {one.num_trials}" for one in shown],
        textposition="auto",
        cliponaxis=False,
        hovertemplate="%{y}<br>%{text}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    caution = (
        f" Caution: below {CAUTION_BELOW} trials, one lucky design moves every share."
        if num_trials < CAUTION_BELOW
        else ""
    )
    says = (
        f"Share of the variance of {metric} between the values of a parameter, less what chance "
        f"would explain, over {num_trials} complete trials; a conditional parameter is judged on "
        f"the trials that have it (n). Shares overlap and need not add up.{caution}"
    )
    return fragment(figure, says=says, x="share of variance", height=90 + 34 * len(shown))


def pareto_scatter(
    records: Sequence[TrialRecord], *, metric: str, other: str, prices: Prices
) -> Markup | None:
    """The metric against another objective; None where fewer than two trials have both."""
    objectives = [metric, other]
    rows = [
        (one, values)
        for one in records
        if (values := objective_values(one, objectives, prices)) is not None
    ]
    if len(rows) < 2:
        return None
    front = pareto_front([one for one, _ in rows], objectives, prices)
    on_front = {one.key for one in front}
    inside = [row for row in rows if row[0].key not in on_front]
    best = sorted((row for row in rows if row[0].key in on_front), key=lambda row: row[1][other])
    figure = go.Figure()
    for label, points, style in (
        (
            "other complete trials",
            inside[:1000],
            {"color": GRAY, "symbol": "circle-open", "size": 8},
        ),
        ("Pareto front", best, {"color": GREEN, "symbol": "diamond", "size": 11}),
    ):
        if points:
            figure.add_scatter(
                x=[values[other] for _, values in points],
                y=[values[metric] for _, values in points],
                mode="lines+markers" if label == "Pareto front" else "markers",
                line={"color": GREEN, "width": 1.5, "dash": "dot"},
                marker=style,
                name=f"{label} ({len(points)})",
                text=[name_of(one) for one, _ in points],
                hovertemplate="%{text}<br>%{x:.4g} → %{y:.4f}<extra></extra>",
            )
    figure.update_layout(showlegend=True)
    way = "larger" if direction(other) > 0 else "smaller"
    members = ", ".join(str(one.number + 1) for one in front[:12])
    says = (
        f"{len(front)} of {len(rows)} complete trials are on the front: no other is at least as "
        f"good in both and better in one. Best {metric} first: trial {members}"
        f"{'…' if len(front) > 12 else ''}."
    )
    title = f"{metric} against {other}"
    return fragment(
        figure, says=says, x=f"{other} ({way} is better)", y=metric, height=340, title=title
    )
