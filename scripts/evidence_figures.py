"""Draws docs/figures/evidence_*.svg from docs/results/evidence_*.json.

Usage: pip install -e .[docs] && python scripts/evidence_figures.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import figure_style  # noqa: F401
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
SETS = {"evidence_beauty": "Amazon Beauty", "evidence_movies": "MovieLens"}
SCATTERED = (
    "backoff_bits", "lcp_held_out", "parallel_bits", "embedding_hitrate", "raw_gini",
    "raw_uniqueness", "usage_min", "reconstruction_r2",
)  # fmt: skip
COMPARED = (
    "backoff_bits", "backoff_bits_head", "backoff_bits_tail", "backoff_gain", "lcp_held_out",
    "lcp_ratio", "code_overlap", "parallel_bits", "parallel_item_ndcg", "embedding_hitrate",
    "embedding_hitrate_codes", "embedding_hitrate_gap", "reconstruction_r2", "order_agreement",
    "raw_gini", "raw_uniqueness", "gini", "uniqueness", "usage_min", "entropy_min",
)  # fmt: skip
GROUPS = {
    "all": "#1f6f54",
    "without controls": "#3465a4",
    "one item a SID, without controls": "#d98e04",
}
RISK = 0.1
GOOD, POOR, SOFT = "#1f6f54", "#b3382c", "#5c6670"


def main() -> None:
    """Draws what there are results for."""
    found = {name: path for name in SETS if (path := ROOT / f"docs/results/{name}.json").exists()}
    contents = {name: json.loads(path.read_text())["result"] for name, path in found.items()}
    for name, content in contents.items():
        save(scatter(content), f"{name}_scatter")
        save(policies(content), f"{name}_policies")
    save(correlations(contents), "evidence_correlations")


def scatter(content: dict[str, Any]) -> plt.Figure:
    """Proxies against the final metric, one panel each."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.6), sharey=True, layout="constrained")
    for axis, proxy in zip(axes.flat, SCATTERED, strict=True):
        for design in content["designs"]:
            if proxy not in design["proxies"]:
                continue
            is_control = design["is_control"]
            axis.errorbar(
                design["proxies"][proxy],
                design["value"],
                yerr=design["error"],
                fmt="x" if is_control else "o",
                ms=5 if is_control else 4,
                color=POOR if is_control else GOOD,
                elinewidth=0.7,
            )
        rho = ranking(content, proxy, "without controls")
        shown = "" if rho is None else f"\nSpearman {rho['value']:+.2f} without controls"
        axis.set_title(f"{proxy}{shown}", fontsize=9)
    axes[0, 0].set_ylabel(content["metric"])
    axes[1, 0].set_ylabel(content["metric"])
    return figure


def correlations(contents: dict[str, dict[str, Any]]) -> plt.Figure:
    """Spearman with intervals of every proxy, a panel for each data set."""
    figure, axes = plt.subplots(
        1, len(contents), figsize=(5.4 * len(contents), 6), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis, (name, content) in zip(axes[0], contents.items(), strict=True):
        for shift, (group, colour) in enumerate(GROUPS.items()):
            for place, proxy in enumerate(COMPARED):
                rho = ranking(content, proxy, group)
                if rho is None:
                    continue
                y = -place + 0.22 * (1 - shift)
                axis.plot([rho["low"], rho["high"]], [y, y], color=colour, lw=1)
                axis.plot(
                    rho["value"], y, "o", ms=3.5, color=colour, label=group if not place else ""
                )
        axis.axvline(0, color=SOFT, lw=0.8)
        axis.set_xlim(-1.05, 1.05)
        axis.set_title(SETS[name])
        axis.set_xlabel(f"Spearman with final {content['metric']}, 90 % interval")
    axes[0, 0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(-0.45, -0.08), frameon=False)
    axes[0, 0].set_yticks([-place for place in range(len(COMPARED))], COMPARED)
    return figure


def policies(content: dict[str, Any]) -> plt.Figure:
    """Compute until a near-best design, and how often the best one was pruned by the gate."""
    rows = [row for row in content["policies"] if row["risk"] == RISK]
    labels = [row["name"] for row in rows]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.32 * len(rows) + 1.2), sharey=True, layout="constrained"
    )
    for place, row in enumerate(rows):
        ends = [1.05 if row[name] is None else row[name] for name in ("cost_low", "cost_high")]
        left.plot(ends, [-place, -place], color=GOOD, lw=2, alpha=0.4)
        if row["cost_to_best"] is not None:
            left.plot(row["cost_to_best"], -place, "o", color=GOOD)
        right.barh(-place, row["pruned_best"], color=POOR, height=0.5)
        right.plot(row["risk"], -place, "|", color=SOFT, ms=12)
    left.axvline(1 / 3, color=SOFT, lw=0.8, ls=":")
    left.set_xlim(0, 1.08)
    left.set_title(
        "share of all training compute until within\na standard error of the best", fontsize=8
    )
    right.set_xlim(0, 0.5)
    right.set_title("share of replays whose gate\npruned the best (mark: the risk)", fontsize=8)
    left.set_yticks([-place for place in range(len(rows))], labels)
    return figure


def ranking(content: dict[str, Any], proxy: str, group: str) -> dict[str, float] | None:
    """Spearman of one proxy in one group, None where undefined."""
    for one in content["proxies"]:
        if (one["proxy"], one["group"]) == (proxy, group):
            rho: dict[str, float] = one["correlation"]["spearman"]
            return None if rho["value"] is None or math.isnan(rho["value"]) else rho
    return None


def save(figure: plt.Figure, name: str) -> None:
    """Writes one file."""
    path = ROOT / "docs" / "figures" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    # No date inside: the same results draw the same file.
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
