"""The comparison table of `forge-ray sid score`: scores down, SID tables across, best in bold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from forge_ray.cli.console import format_value
from forge_ray.sid.metrics.registry import GROUPS, METRICS, Group, Metric, find_metric

_ARROWS = {"higher": "↑", "lower": "↓", None: ""}
_NAME_WIDTH = 35
"""Columns of the longest score's name, its arrow and the frame."""
_TABLE_WIDTH = 12
"""Columns of one SID table with its frame: its name is folded to fit."""


def comparison(rows: Sequence[Mapping[str, Any]], *, width: int) -> Iterator[Table]:
    """Lay out scored tables for people; --json has every figure.

    Args:
        rows: one mapping of scores per SID table, with `table` and `split`.
        width: columns of the terminal; tables that do not fit beside each other follow below.

    Yields:
        One printable table for as many SID tables as fit.
    """
    fitting = max(1, (width - _NAME_WIDTH) // _TABLE_WIDTH)
    best = _best(rows)
    for start in range(0, len(rows), fitting):
        yield _layout(rows[start : start + fitting], best)


def _layout(rows: Sequence[Mapping[str, Any]], best: Mapping[str, float]) -> Table:
    layout = Table(title="SID scores", title_justify="left", header_style="bold", padding=(0, 1))
    layout.add_column("score", no_wrap=True)
    layout.add_column("", no_wrap=True)
    for row in rows:
        layout.add_column(
            str(row["table"]), justify="right", overflow="fold", width=_TABLE_WIDTH - 3
        )
    layout.add_row("split", "", *[str(row["split"]) for row in rows])
    for group, heading in GROUPS.items():
        names = _shown(rows, group)
        if names:
            layout.add_section()
            layout.add_row(Text(heading, style="bold"), "")
        for name, metric in names:
            cells = [_cell(name, row.get(name), best) for row in rows]
            layout.add_row(name, _ARROWS[metric.better], *cells)
    return layout


def _shown(rows: Sequence[Mapping[str, Any]], group: Group) -> list[tuple[str, Metric]]:
    """Printed scores of a group that some table has, in the order of the registry."""
    places = {name: place for place, name in enumerate(METRICS)}
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        metric = find_metric(name)
        is_raw = name.startswith("raw_")  # equal to the figure shown unless a resolver worked
        is_known = any(row.get(name) is not None for row in rows)
        if metric and metric.shown and metric.group == group and is_known and not is_raw:
            found[name] = metric
    return sorted(found.items(), key=lambda item: places[item[1].name])


def _best(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Best value of each score with a direction, where tables differ."""
    best = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        metric = find_metric(name)
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        if metric is not None and metric.sign and len(set(values)) > 1:
            best[name] = max(values, key=lambda value: metric.sign * value)
    return best


def _cell(name: str, value: Any, best: Mapping[str, float]) -> Text:
    is_tiny = isinstance(value, float) and 0 < abs(value) < 5e-5
    text = f"{value:.1e}" if is_tiny else format_value(value)
    is_best = name in best and value == best[name]
    return Text(text, style="bold green" if is_best else "")
