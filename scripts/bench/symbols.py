"""Full symbol statistics of ten million SIDs beside one sort of their packed keys.

The bare side is `numpy.sort` of int64 keys that are packed already; ours starts from the codes and
ends with every figure of the report. The two sides take turns on one core; the best of the turns
counts, and CPU seconds stand beside wall seconds because a shared machine stretches the latter.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from forge_ray.sid.metrics.quality import prefix_ids, symbol_quality
from forge_ray.sid.table import prefix_keys

ITEMS, LEVELS, TURNS = 10_000_000, 3, 7
SIZES = (256, 1000, 8192)


def run(scale: float) -> dict[str, Any]:
    """Seconds of both sides by codebook size, and the peak of the process in MB."""
    rows = max(1000, int(ITEMS * scale))
    found = {f"{rows:,} x {LEVELS}, K {size}": compare(rows, size) for size in SIZES}
    found["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return found


def compare(rows: int, size: int) -> dict[str, float]:
    """One codebook size."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, size, size=(rows, LEVELS)).astype(np.uint16)
    sizes = [size] * LEVELS
    keys = prefix_keys(codes, sizes, LEVELS)
    bare, ours = [], []
    for _ in range(TURNS):
        bare.append(clocks(lambda: np.sort(keys)))
        ours.append(clocks(lambda: symbol_quality(codes, sizes)))
    numbered = clocks(lambda: prefix_ids(codes))
    sort_s, report_s = (min(side)[0] for side in (bare, ours))
    sort_cpu, report_cpu = (min(turn[1] for turn in side) for side in (bare, ours))
    return {
        "sort_s": round(sort_s, 4),
        "report_s": round(report_s, 4),
        "report_over_sort": round(report_s / sort_s, 2),
        "report_over_sort_cpu": round(report_cpu / sort_cpu, 2),
        "prefix_ids_s": round(numbered[0], 2),
    }


def clocks(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu
