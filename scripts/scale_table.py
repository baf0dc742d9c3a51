"""Writes the tables of the scale run in docs/performance.md from docs/results/scale.json.

Usage: python scripts/scale_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, RECORD = DOCS / "performance.md", DOCS / "results" / "scale.json"
MARKS = {
    "stages": ("<!-- scale -->\n", "<!-- end of scale -->"),
    "growth": ("<!-- growth -->\n", "<!-- end of growth -->"),
    "projection": ("<!-- projection -->\n", "<!-- end of projection -->"),
}


def main() -> None:
    """Replaces what stands between each pair of marks."""
    result = json.loads(RECORD.read_text(encoding="utf-8"))["result"]
    text = PAGE.read_text(encoding="utf-8")
    for name, (start, end) in MARKS.items():
        before, _, rest = text.partition(start)
        text = before + start + TABLES[name](result) + end + rest.partition(end)[2]
    PAGE.write_text(text, encoding="utf-8")


def stages(result: dict[str, Any]) -> str:
    """Every stage of every size, and how `prepare` compares with Arrow."""
    head = [
        "stage",
        "seconds",
        "CPU s",
        "rows/s",
        "driver",
        "largest worker",
        "workers",
        "store",
        "spilled",
    ]
    text = ""
    for run in result["sizes"]:
        rows = [_stage(name, row) for name, row in run["stages"].items()]
        asked = f"{run['items']:,} items, {run['interactions_asked']:,} interactions asked for"
        made = f"{run['rows']['interactions']:,} made" if "rows" in run else "not prepared"
        text += f"{asked}, {made}; a command and its Ray start in {run['start_s']} s.\n\n"
        text += _table(head, rows) + "\n" + _arrow(run)
    return text


def _stage(name: str, row: dict[str, Any]) -> list[str]:
    rate = f"{row['rows_per_s']:,} {row['unit']}" if row["rows_per_s"] else ""
    gib = [_gib(row[f"{key}_mib"]) for key in ("driver_rss", "largest_worker_own")]
    more = [_gib(row[f"{key}_mib"]) for key in ("all_workers_own", "object_store", "spilled")]
    times = [f"{row[key]:,}" for key in ("seconds", "cpu_seconds")]
    return [name, *times, rate, *gib, *more]


def _arrow(run: dict[str, Any]) -> str:
    if "cut" not in run["stages"]:
        return ""
    rates = []
    for ours, theirs in (("seconds", "rows_per_s"), ("cpu_seconds", "rows_per_cpu_s")):
        took = sum(run["stages"][name][ours] for name in ("index_and_order", "cut"))
        rates.append((run["rows"]["interactions"] / took, run["arrow"][theirs]))
    wall, cpu = [f"{ours:,.0f} against {theirs:,}, {ours / theirs:.2f} ×" for ours, theirs in rates]
    return (
        f"`prepare` against Arrow's sort and group-by of {run['arrow']['rows']:,} rows in one "
        f"process: {wall} in interactions/s; {cpu} in interactions per CPU second.\n\n"
    )


def growth(result: dict[str, Any]) -> str:
    """The exponents."""
    names = (
        "seconds",
        "cpu_seconds",
        "driver_rss",
        "largest_worker_own",
        "object_store",
        "spilled",
    )
    rows = [
        [
            row["stage"],
            f"{row['items_x']:g} ×, {row['interactions_x']:g} ×",
            *("" if row[name] is None else f"{row[name]:g}" for name in names),
            f"{_gib(row['driver_mib_before'])} → {_gib(row['driver_mib'])}",
        ]
        for row in result["growth"]
    ]
    head = ["seconds", "CPU s", "driver", "largest worker", "store", "spilled", "driver, GiB"]
    return _table(["stage", "items, interactions", *head], rows)


def projection(result: dict[str, Any]) -> str:
    """Assumptions, and what each stage would take."""
    found = result["projection"]
    words = [
        f"{name.replace('_', ' ')} {value:,}" for name, value in list(found["assumed"].items())[1:]
    ]
    names = (
        "stage",
        "from_items",
        "grows_with",
        "times_more_work",
        "nodes",
        "hours",
        "node_hours",
        "usd",
    )
    memory = ("driver_gib", "largest_worker_gib")
    rows = [[_spelled(row[name]) for name in (*names, *memory)] for row in found["stages"]]
    blank = [""] * (len(names) - 1)
    rows += [
        [row["stage"], *blank, *(_spelled(row[name]) for name in memory)]
        for row in found["memory_alone"]
    ]
    head = [
        "stage",
        "measured at items",
        "grows with",
        "× work",
        "nodes",
        "hours",
        "node-hours",
        "USD",
        "GiB, driver",
        "GiB, largest worker",
    ]
    return (
        f"Node: {found['assumed']['node']}. Assumed: {'; '.join(words)}.\n\n{_table(head, rows)}\n"
        f"Together {found['hours']:,} h, {found['node_hours']:,} node-hours, {found['usd']:,} USD, "
        f"{_left_out(result)}. "
        f"Of these figures the first to stand in the way: {found['first_bottleneck']}.\n"
    )


def _left_out(result: dict[str, Any]) -> str:
    """What the total lacks: a GPU's work, and pairs where a run counted none."""
    if all(run["window"] for run in result["sizes"]):
        return "without training and decoding"
    return (
        "without training, decoding and the counting of pairs, which `data prepare` does by "
        "default (`pairs.window=5`) and this run did not (`pairs.window=0`)"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _spelled(value: float | str | None) -> str:
    if value is None:
        return "not known"
    return value if isinstance(value, str) else f"{value:,}"


def _gib(mib: float) -> str:
    return f"{mib / 1024:.2f}"


TABLES = {"stages": stages, "growth": growth, "projection": projection}


if __name__ == "__main__":
    main()
