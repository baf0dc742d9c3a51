"""Draws docs/figures/convergence_*.svg from docs/results/gr_converge.json and prints its table.

Usage: pip install -e .[docs] && python scripts/convergence_figures.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from forge_ray.cli.gr_converge_figure import COLORS, REFERENCE, places
from forge_ray.gr.convergence import Point, mean_curve

ROOT = Path(__file__).resolve().parents[1]

mpl.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "forge-ray",
        "figure.facecolor": "white",
    }
)


def main() -> None:
    """Draws every set of the record."""
    content = json.loads((ROOT / "docs/results/gr_converge.json").read_text())["result"]
    for name, one in content.items():
        path = ROOT / "docs" / "figures" / f"convergence_{name}.svg"
        figure = draw(one)
        # No date inside: the same results draw the same file.
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        print(f"wrote {path.relative_to(ROOT)}")
        for arm, summary in one["summaries"].items():
            print(row(arm, summary, one["by_seed"][arm]))


def draw(content: dict[str, Any]) -> plt.Figure:
    """Means over seeds with the seeds' spread; offline steps are left of 0."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for arm, seeds in content["curves"].items():
        curves = [[Point(**point) for point in one] for one in seeds]
        mean = mean_curve(curves)
        x, values = places(mean), np.array([[point.value for point in one] for one in curves])
        if arm == "cold":
            axis.plot(x, [point.reference for point in mean], "--", color=REFERENCE, label="old")
        axis.plot(x, [point.value for point in mean], color=COLORS[arm], label=arm)
        axis.fill_between(
            x, values.min(axis=0), values.max(axis=0), color=COLORS[arm], alpha=0.12, lw=0
        )
    axis.axvline(0, color="#8a929a", lw=0.8, ls=":")
    axis.set_xlabel("optimiser steps since the roll-out (left: offline)")
    axis.set_ylabel(content["config"]["metric"])
    axis.legend(frameon=False, fontsize=8)
    return figure


def row(arm: str, summary: dict[str, Any], seeds: list[dict[str, Any]]) -> str:
    """A line of the table in docs/convergence.md."""
    each = ", ".join("–" if s["reached"] is None else str(s["reached"]["steps"]) for s in seeds)
    reached = summary["reached"]
    cells = ["not", "", ""]
    if reached is not None:
        cells = [
            str(reached["steps"]),
            str(reached["total_steps"]),
            f"{reached['total_tokens']:,}",
        ]
    steps = [f"{summary[f'gap_{part}'] / summary['steps']:+.4f}" for part in ("online", "total")]
    ends = [f"{summary[end]:.4f}" for end in ("first", "last")]
    return f"| {' | '.join([f'`{arm}`', cells[0], each, *cells[1:], *steps, *ends])} |"


if __name__ == "__main__":
    main()
