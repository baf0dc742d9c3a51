"""Draws docs/figures/convergence.svg from the records of roll-outs and prints their tables.

Usage: pip install -e .[docs] && python scripts/converge_figures.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import figure_style  # noqa: F401
import matplotlib.pyplot as plt
import numpy as np

from forge_ray.gr.convergence import Point, summarize

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ("gr_converge", "gr_converge_movies")
TITLES = {"shop": "synthetic shop", "movies": "MovieLens"}
COLORS = {
    "cold": "#b3382c",
    "dense": "#d98e04",
    "offline": "#3465a4",
    "mapped": "#7fb069",
    "mapped_offline": "#1f6f54",
}
OLD = "#5c6670"


def main() -> None:
    """Draws the online curves and prints a table a set."""
    content: dict[str, Any] = {}
    for name in RECORDS:
        content |= json.loads((ROOT / f"docs/results/{name}.json").read_text())["result"]
    figure, axes = plt.subplots(1, len(content), figsize=(4.6 * len(content), 3.4))
    for axis, (name, found) in zip(np.atleast_1d(axes), content.items(), strict=True):
        draw(axis, found)
        axis.set_title(TITLES.get(name, name))
        print(f"\n{name}\n\n" + "\n".join(table(found)))
    np.atleast_1d(axes)[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/figures/convergence.svg", metadata={"Date": None})


def draw(axis: Any, found: dict[str, Any]) -> None:
    """Mean of the seeds against online steps, over all stages; the seeds thinly."""
    old = None
    for arm, several in found["curves"].items():
        online = [[one for one in curve if one["phase"] == "online"] for curve in several]
        steps = [one["steps"] for one in online[0]]
        values = np.array([[one["value"] for one in curve] for curve in online])
        old = np.mean([[one["reference"] for one in curve] for curve in online], axis=0)
        axis.plot(steps, values.mean(axis=0), color=COLORS[arm], label=arm.replace("_", ", "))
        for one in values:
            axis.plot(steps, one, color=COLORS[arm], alpha=0.2, linewidth=0.7)
    axis.plot(steps, old, color=OLD, linestyle="--", label="old model")
    axis.set_xlabel("online steps")
    axis.set_ylabel(found["config"]["metric"])


def table(found: dict[str, Any]) -> list[str]:
    """A row a start: of the mean curve, and by seed where the old model was reached."""
    rows = [
        "| start | steps to 90 %, held | to 95 %, held | first touch | by seed "
        "| gap online | gap in all |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, one in found["summaries"].items():
        seeds = found["by_seed"][arm]
        mean = mean_curve(found["curves"][arm])
        held = [summarize(mean, share=share, hold=2).reached for share in (0.9, 0.95)]
        cells = [
            f"`{arm}`",
            *(str(each.steps) if each else "–" for each in held),
            str(one["reached"]["steps"]) if one["reached"] else "–",
            ", ".join(str(each["reached"]["steps"]) if each["reached"] else "–" for each in seeds),
            spread([each["gap_online"] for each in seeds]),
            spread([each["gap_total"] for each in seeds]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def mean_curve(several: list[list[dict[str, Any]]]) -> list[Point]:
    """The seeds' mean: all were measured at the same steps."""
    return [
        Point(
            **{
                **points[0],
                "value": float(np.mean([one["value"] for one in points])),
                "reference": float(np.mean([one["reference"] for one in points])),
            }
        )
        for points in zip(*several, strict=True)
    ]


def spread(values: list[float]) -> str:
    """Mean and standard deviation of the seeds."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


if __name__ == "__main__":
    main()
