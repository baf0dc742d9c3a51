"""Figures about trials and compute: the waterfall, use over time, seconds per trial."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from markupsafe import Markup

from forge_ray.sweep.charts.figure import (
    AMBER,
    GREEN,
    RED,
    STAGE_COLORS,
    fragment,
    name_of,
)
from forge_ray.sweep.config import BudgetConfig
from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.spending import Removal, Timeline, Unit
from forge_ray.sweep.views import STAGES

_PATTERNS = {"fit": "", "score": "/", "train": "", "evaluate": "\\", "cluster": "x"}


def waterfall_bars(rows: Sequence[Removal], *, planned: int) -> Markup:
    """From the planned designs down to those that are complete."""
    steps = ["designed", *(row.step for row in rows)]
    left, ended = [planned, *(row.left for row in rows)], [0, *(row.ended for row in rows)]
    if rows and rows[-1].step != "complete":
        steps, left, ended = [*steps, "complete"], [*left, rows[-1].left], [*ended, 0]
    figure = go.Figure()
    figure.add_bar(
        y=steps,
        x=left,
        name="go on",
        orientation="h",
        marker={"color": GREEN},
        text=[str(one) for one in left],
        textposition="auto",
        hovertemplate="%{y}: %{x} go on<extra></extra>",
    )
    figure.add_bar(
        y=steps,
        x=ended,
        name="end here",
        orientation="h",
        marker={
            "color": AMBER,
            "pattern": {"shape": "/", "fgcolor": "rgba(0,0,0,.35)", "fillmode": "overlay"},
        },
        text=[f"−{one}" if one else "" for one in ended],
        insidetextfont={"color": "#1d2327"},
        textposition="auto",
        hovertemplate="%{y}: %{x} end here<extra></extra>",
    )
    figure.update_layout(barmode="stack", bargap=0.3, legend={"traceorder": "normal"})
    figure.update_xaxes(range=[0, 1.12 * planned])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    done = left[-1]
    says = f"Of {planned} designs, {done} trained to the end; " + (
        "; ".join(f"{row.step}: {row.ended}" for row in rows) or "none has ended"
    )
    return fragment(figure, says=f"{says}.", x="trials", height=100 + 34 * len(steps))


def use_over_time(found: Timeline, unit: Unit, budget: BudgetConfig) -> Markup:
    """Cumulative use by stage over the hours that the sweep ran, with its limits."""
    figure = go.Figure()
    # Steps, not slopes: a stage is counted when it is known. Minutes where hours would be dust.
    scale, x_unit = (60.0, "minutes") if found.hours[-1] < 2 else (1.0, "hours")
    for stage, values in found.by_stage.items():
        if values[-1] > 0:
            figure.add_scatter(
                x=[scale * one for one in found.hours],
                y=values,
                mode="lines",
                line={"width": 1, "color": STAGE_COLORS[stage], "shape": "hv"},
                stackgroup="use",
                name=stage,
                fillpattern={"shape": _PATTERNS[stage], "fgopacity": 0.35, "size": 8},
                hovertemplate=f"{stage} %{{y:.3g}}<extra></extra>",
            )
    limits = []
    if budget.max_cost is not None and unit.name == "USD":
        limits.append(f"max_cost {budget.max_cost:g} USD")
        figure.add_hline(y=budget.max_cost, line={"color": RED, "dash": "dash"})
    if budget.max_hours is not None:
        limits.append(f"max_hours {budget.max_hours:g}")
        figure.add_vline(x=scale * budget.max_hours, line={"color": RED, "dash": "dashdot"})
    if limits:
        figure.add_scatter(
            x=[None], y=[None], mode="lines", line={"color": RED, "dash": "dash"}, name="budget"
        )
    figure.update_layout(hovermode="x unified", showlegend=True)
    says = (
        f"{unit.name} by stage over {scale * found.hours[-1]:.1f} {x_unit} of running, "
        f"{found.total:.4g} in all, pauses between sessions left out; fit and score "
        "count from a trial's start, the rest from its end."
    )
    says += f" Broken lines: the budget ({', '.join(limits)})." if limits else " No budget is set."
    return fragment(figure, says=says, x=f"{x_unit} of running", y=unit.name, height=360)


def stage_seconds(records: Sequence[TrialRecord]) -> Markup:
    """Seconds of each stage, stacked per trial; of many trials, those that took longest."""
    longest = sorted(records, key=lambda one: -sum(one.seconds.values()))[:_MAX_BARS]
    shown = sorted(longest, key=lambda one: one.number)
    figure = go.Figure()
    for stage in STAGES:
        figure.add_bar(
            y=[f"trial {one.number + 1}" for one in shown],
            x=[one.seconds.get(stage, 0.0) for one in shown],
            name=stage,
            orientation="h",
            marker={
                "color": STAGE_COLORS[stage],
                "pattern": {
                    "shape": _PATTERNS[stage],
                    "fgcolor": "rgba(0,0,0,.4)",
                    "fillmode": "overlay",
                    "size": 6,
                },
            },
            text=[name_of(one) for one in shown],
            textposition="none",
            hovertemplate=f"%{{text}}<br>{stage} %{{x:.1f}} s<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_yaxes(autorange="reversed", dtick=1, showgrid=False)
    says = "Seconds of each trial by stage, all its starts together." + (
        f" The {len(shown)} longest of {len(records)}." if len(shown) < len(records) else ""
    )
    return fragment(figure, says=says, x="seconds", height=110 + 22 * len(shown))


_MAX_BARS = 40
