"""What `forge-ray sweep status` draws: a heading and one line per trial, once or until the end.

Reads the ledger and the driver's lock, nothing else: neither Ray nor Optuna is asked.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from forge_ray.cli.console import emit, stdout
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import SweepLock, json_ready
from forge_ray.sweep.progress import PROXIES, Progress, interesting, progress
from forge_ray.sweep.tail import LedgerTail

REFRESH_S = 2.0
_WIDE = 110
"""Columns from which on the reason has room beside the rest."""

_STYLES = {"running": "cyan", "complete": "green", "failed": "red", "interrupted": "yellow"}


class StatusView:
    """The state of one sweep, looked at as often as wanted."""

    def __init__(self, config: SweepConfig, folder: Path, *, shows_all: bool) -> None:
        self._config = config
        self._tail = LedgerTail(folder)
        self._lock = SweepLock(folder)
        self._shows_all = shows_all

    def look(self) -> Progress:
        """The state now."""
        # The lock first: a driver that ends in between has written everything.
        is_running = self._lock.is_held()
        self._tail.poll()
        return progress(self._tail.records, metric=self._config.metric, is_running=is_running)

    def draw(self, state: Progress, console: Console) -> Group:
        """The state as heading and table, as wide as the console."""
        metric = self._config.metric
        rows = state.trials if self._shows_all else interesting(state.trials, metric=metric)
        parts: list[Any] = [*_heading(self._config.name, metric, state, budget=self._budget(state))]
        if rows:
            parts.append(_table(rows, metric=metric, width=console.width))
        hidden = len(state.trials) - len(rows)
        if hidden:
            parts.append(Text(f"{hidden:,} more trials; --all shows them", style="dim"))
        return Group(*parts)

    def as_json(self, state: Progress) -> dict[str, Any]:
        """The state for programs: every trial, every field."""
        content = dataclasses.asdict(state)
        facts = {"metric": self._config.metric, "budget": self._budget(state)}
        return {"running": content.pop("is_running"), **facts, **content}

    def _budget(self, state: Progress) -> dict[str, Any] | None:
        """What is spent and allowed, None where the sweep file names neither limit nor price."""
        config = self._config.budget
        if config.max_cost is None and config.max_hours is None and not config.prices.is_set:
            return None
        # Imports Ray, which most looks at a sweep do without.
        from forge_ray.sweep.budget import budget_state

        found = budget_state(self._tail.records, config, is_running=state.is_running)
        return dataclasses.asdict(found)


def show(view: StatusView, *, as_json: bool) -> Progress:
    """Prints the state once and returns it."""
    state = view.look()
    if as_json:
        emit(view.as_json(state), title="", as_json=True)
    else:
        stdout.print(view.draw(state, stdout))
    return state


def watch(view: StatusView, *, as_json: bool) -> Progress:
    """Redraws the state until no driver runs, or Ctrl-C; returns the last one.

    As JSON, each new state is one line. Where the output is no terminal, the last state is printed.
    """
    state = view.look()
    if as_json:
        return _stream(view, state)
    with Live(view.draw(state, stdout), console=stdout, auto_refresh=False) as live:
        try:
            while state.is_running:
                time.sleep(REFRESH_S)
                state = view.look()
                live.update(view.draw(state, stdout), refresh=True)
        except KeyboardInterrupt:
            pass  # the wanted end of watching; the sweep goes on
    return state


def _stream(view: StatusView, state: Progress) -> Progress:
    try:
        while True:
            line = json.dumps(json_ready(view.as_json(state)), ensure_ascii=False, allow_nan=False)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            if not state.is_running:
                return state
            time.sleep(REFRESH_S)
            state = view.look()
    except KeyboardInterrupt:
        return state


def _heading(
    name: str, metric: str, state: Progress, *, budget: Mapping[str, Any] | None
) -> list[Text]:
    found = state.counts
    done = found["trials"] - found["open"]
    told = [f"{value} {what}" for what, value in found.items() if value and what != "trials"]
    lines = [
        f"{name}: {'running' if state.is_running else 'not running'}, "
        f"{done} of {state.planned} trials ended, {_clock(state.elapsed_s)}",
        ", ".join(told),
    ]
    if state.best:
        error = state.best["error"]
        spread = f" ± {error:.4f}" if isinstance(error, float) else ""
        lines.append(
            f"best {metric} {state.best['value']:.4f}{spread}: trial {state.best['trial']}, "
            f"{state.best['design']}"
        )
    if budget is not None:
        lines.append(_spent(budget))
    if state.dashboard:
        lines.append(f"Ray dashboard: {state.dashboard}")
    return [
        Text(line, style="bold" if not place else "", no_wrap=True, overflow="ellipsis")
        for place, line in enumerate(lines)
        if line
    ]


def _spent(budget: Mapping[str, Any]) -> str:
    parts = []
    for unit, spent, most in (("USD", "spent_usd", "max_cost"), ("h", "spent_hours", "max_hours")):
        limit = "" if budget[most] is None else f" of {budget[most]:g}"
        parts.append(f"{budget[spent]:.4g}{limit} {unit}")
    stopped = budget["stopped"]
    return f"budget: {', '.join(parts)}" + (f"; stopped: {stopped['reason']}" if stopped else "")


_SHORT = {"backoff_bits": "bits", "uniqueness": "uniq", "embedding_hitrate": "hit"}


def _table(rows: list[dict[str, Any]], *, metric: str, width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    # Design and reason give way, never the numbers.
    table.add_column("design", no_wrap=True, overflow="ellipsis", ratio=1, min_width=8)
    for name in (*_SHORT.values(), "step", "now", "best", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    if width >= _WIDE:
        table.add_column("reason", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        cells = _cells(row, metric=metric)
        reason = [Text(row["reason"])] if width >= _WIDE else []
        table.add_row(*cells, *reason)
    return table


def _cells(row: Mapping[str, Any], *, metric: str) -> list[Text]:
    state = "pruned" if row["state"].startswith("pruned") else row["state"]
    proxies = [_figure(row[name], 2 if name == "backoff_bits" else 3) for name in PROXIES]
    return [
        Text(f"{row['trial']}"),
        Text(state, style=_STYLES.get(state, "")),
        Text(row["stage"]),
        Text(row["design"]),
        *(Text(one) for one in proxies),
        Text("–" if row["step"] is None else f"{row['step']}"),
        Text(_figure(row[metric], 4)),
        Text(_figure(row["best"], 4)),
        Text(_clock(row["seconds"])),
    ]


def _figure(value: Any, digits: int) -> str:
    if not isinstance(value, (int, float)):
        return "–"
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def _clock(seconds: float) -> str:
    """`0:04:05`."""
    return str(timedelta(seconds=round(seconds)))
