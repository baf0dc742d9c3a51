"""How time and memory grow from one size to the next: the exponent of a power law.

An exponent of 1 is growth in step with the data: with interactions in the stages that read them,
with items in the others; where those do not grow, with what does. Small amounts say nothing:
seconds less than `LEAST_S` and memory less than `LEAST_MIB` are those of a process that has just
started. Nor do sizes that are nearly the same: what grew by less than `LEAST_GROWTH` has not grown.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

LEAST_S, LEAST_MIB = 5.0, 32
LEAST_GROWTH = 1.1
READ_INTERACTIONS = ("synthesize", "index_and_order", "cut")
MEMORY = ("driver_rss_mib", "largest_worker_own_mib", "object_store_mib", "spilled_mib")


def growth(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each stage and pair of neighbouring sizes.

    Args:
        runs: figures by growing size. The start of a command and its Ray is taken off the seconds.
    """
    rows: list[dict[str, Any]] = []
    for small, large in itertools.pairwise(runs):
        factors = [large["rows"][one] / small["rows"][one] for one in ("items", "interactions")]
        pair = {"items_x": round(factors[0], 2), "interactions_x": round(factors[1], 2)}
        rows += [
            {"stage": name, **pair, **_exponents(name, small, large, _factor(name, *factors))}
            for name in small["stages"]
            if name in large["stages"]
        ]
    return rows


def _factor(name: str, items: float, interactions: float) -> float | None:
    """How much more there is of what a stage grows with; None where neither has grown."""
    factors = (interactions, items) if name in READ_INTERACTIONS else (items, interactions)
    return next((one for one in factors if one >= LEAST_GROWTH), None)


def _exponents(
    name: str, small: dict[str, Any], large: dict[str, Any], factor: float | None
) -> dict[str, Any]:
    before, after = small["stages"][name], large["stages"][name]
    found: dict[str, float | None] = {}
    for key, start in (("seconds", "start_s"), ("cpu_seconds", "start_cpu_s")):
        worked = [_worked(name, run, key, start) for run in (small, large)]
        found[key] = _exponent(*worked, factor, LEAST_S)
    for key in MEMORY:
        found[key.removesuffix("_mib")] = _exponent(before[key], after[key], factor, LEAST_MIB)
    driver = {"driver_mib_before": before["driver_rss_mib"], "driver_mib": after["driver_rss_mib"]}
    return {**found, **driver}


def _worked(name: str, run: dict[str, Any], key: str, start: str) -> float:
    """Seconds of a stage less those of its command's start, which the first stage bears."""
    starts = name not in ("cut", "encode", "resolve")
    return float(run["stages"][name][key]) - (run[start] if starts else 0.0)


def _exponent(before: float, after: float, factor: float | None, least: float) -> float | None:
    if factor is None or min(before, after) < least:
        return None
    return round(math.log(after / before) / math.log(factor), 2)
