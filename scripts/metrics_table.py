"""Writes the table of scores in docs/metrics.md from the registry.

Usage: python scripts/metrics_table.py
"""

from __future__ import annotations

from pathlib import Path

from forge_ray.sid.metrics.registry import GROUPS, METRICS, Metric

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
START, END = "<!-- scores -->\n", "<!-- end of scores -->"
ARROWS = {"higher": "↑", "lower": "↓", None: ""}


def main() -> None:
    """Replaces what stands between the marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + START + table() + END + after, encoding="utf-8")


def table() -> str:
    """All scores as Markdown."""
    head = "| group | score | better | gate | what it says |\n|---|---|---|---|---|\n"
    return head + "".join(row(metric) for metric in METRICS.values())


def row(metric: Metric) -> str:
    """One score."""
    gate = "yes" if metric.gate_safe else ""
    doc = metric.doc.replace("|", "\\|")
    group = GROUPS[metric.group].lower()
    return f"| {group} | `{metric.name}` | {ARROWS[metric.better]} | {gate} | {doc} |\n"


if __name__ == "__main__":
    main()
