"""The curves of a change of SIDs as one figure that a browser opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from forge_ray.gr.convergence import Point

COLORS = {
    "cold": "#8a929a",
    "dense": "#d98e04",
    "offline": "#4a86c8",
    "mapped": "#d4574a",
    "mapped_offline": "#7a6fd0",
}
REFERENCE = "#2e9d78"


def figure(curves: Mapping[str, Sequence[Point]], metric: str) -> go.Figure:
    """Every start beside the old model; offline steps stand left of 0, where serving begins.

    Args:
        curves: points by arm, offline ones first.
        metric: title of the vertical axis.
    """
    drawn = go.Figure()
    longest = max(curves.values(), key=len)
    online = [point for point in longest if point.phase == "online"]
    drawn.add_scatter(
        x=[point.steps for point in online],
        y=[point.reference for point in online],
        name="old model, old SIDs",
        line={"color": REFERENCE, "dash": "dash"},
    )
    for arm, points in curves.items():
        drawn.add_scatter(
            x=places(points),
            y=[point.value for point in points],
            name=arm,
            line={"color": COLORS[arm]},
        )
    drawn.add_vline(x=0, line={"color": "#8a929a", "dash": "dot"})
    drawn.update_layout(
        template="plotly_white",
        xaxis_title="optimiser steps since the roll-out (offline: before it)",
        yaxis_title=metric,
    )
    return drawn


def places(points: Sequence[Point]) -> list[int]:
    """Steps on one axis: offline ones end at 0, online ones begin there."""
    offline = max((point.steps for point in points if point.phase == "offline"), default=0)
    return [point.steps - offline * (point.phase == "offline") for point in points]
