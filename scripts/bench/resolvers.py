"""`knn_cap` beside the policy in plain Python: ten million items, 30 % of them overflow.

The plain side runs on 100,000 items of the same density and is extrapolated linearly, in its
favour: its dictionaries would outgrow the caches. Both sides start from codes, ids and candidate
lists, hash the ids, and count SIDs before and after. The lists of ten million items would take
1.2 GB, so ours are copied together block by block; that time, shared by the threads that spend it,
is stated and left out, as the plain side gets its lists made. Plain Python has one thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from forge_ray.sid.resolvers import KnnCapConfig, Resolution, resolve
from forge_ray.threads import threads_given

ITEMS, PLAIN_ITEMS = 10_000_000, 100_000
CAP, CANDIDATES = 5, 200
SIZES = (1024, 1024, 1024)
ITEMS_PER_PREFIX = 150
_LISTS = 4096
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Catalogue:
    """Skewed codes of some items."""

    codes: np.ndarray
    ids: pa.Array
    lists: np.ndarray
    spent: list[float]

    @classmethod
    def draw(cls, num_items: int) -> Catalogue:
        """About 150 items per prefix, most of them on few of its 1024 last codes."""
        rng = np.random.default_rng(0)
        prefix = rng.integers(0, max(1, num_items // ITEMS_PER_PREFIX), num_items)
        favourite = (rng.random(num_items) ** 6 * SIZES[2]).astype(np.int64)
        last = (favourite * 389 + prefix * 7) % SIZES[2]
        codes = np.column_stack([prefix // SIZES[1], prefix % SIZES[1], last]).astype(np.uint16)
        lists = np.argsort(rng.random((_LISTS, SIZES[2])), axis=1)[:, :CANDIDATES]
        return cls(
            codes, pa.array([f"item{i:08d}" for i in range(num_items)]), lists.astype("u2"), []
        )

    def candidates(self, rows: np.ndarray, limit: int) -> np.ndarray:
        """The own code, then a list that many items share."""
        started = time.perf_counter()
        out = np.empty((len(rows), CANDIDATES + 1), dtype=np.uint16)
        out[:, 0] = self.codes[rows, -1]
        out[:, 1:] = self.lists[rows % _LISTS]
        self.spent.append(time.perf_counter() - started)
        return out[:, :limit]


def run(scale: float) -> dict[str, Any]:
    """Time both sides; `scale` 1 means ten million items."""
    plain_case = Catalogue.draw(PLAIN_ITEMS)
    codes, ids = plain_case.codes.tolist(), plain_case.ids.to_pylist()
    lists = [
        plain_case.candidates(np.array([row]), CANDIDATES + 1)[0].tolist()
        for row in range(PLAIN_ITEMS)
    ]
    plain, plain_s = _timed(lambda: plain_knn_cap(codes, ids, lists))
    ours_small = _ours(plain_case)
    assert np.array_equal(ours_small.codes, plain), "both sides must agree"
    case = Catalogue.draw(int(ITEMS * scale))
    _reset_peak()
    before_gib = _peak_gib()
    ours, seconds = _timed(lambda: _ours(case))
    items = len(case.codes)
    plain_extrapolated_s = plain_s * items / PLAIN_ITEMS
    lists_s = sum(case.spent) / threads_given()
    return {
        "items": items,
        "overflow_share": (ours.report["moved"] + ours.report["unplaced"]) / items,
        "unplaced": ours.report["unplaced"],
        "mean_candidate_rank": ours.report["mean_candidate_rank"],
        "seconds": seconds,
        "seconds_making_lists": lists_s,
        "plain_python_seconds_100k": plain_s,
        "plain_python_seconds_extrapolated": plain_extrapolated_s,
        "times_faster": plain_extrapolated_s / (seconds - lists_s),
        "times_faster_with_lists": plain_extrapolated_s / seconds,
        "gib_before": before_gib,
        "peak_gib": _peak_gib(),
    }


def plain_knn_cap(
    codes: list[list[int]], ids: list[str], lists: list[list[int]]
) -> list[list[int]]:
    """The policy as its definition reads, one item at a time."""
    order = sorted(range(len(ids)), key=lambda row: (_plain_hash(ids[row]), ids[row]))
    count: Counter[tuple[int, ...]] = Counter()
    pool = []
    for row in order:
        sid = tuple(codes[row])
        if count[sid] < CAP:
            count[sid] += 1
        else:
            pool.append(row)
    out = [list(code) for code in codes]
    unplaced = []
    for row in pool:
        own = codes[row][-1]
        for code in [code for code in lists[row] if code != own][:CANDIDATES]:
            sid = (*codes[row][:-1], code)
            if count[sid] < CAP:
                count[sid] += 1
                out[row][-1] = code
                break
        else:
            unplaced.append(row)
    # Our side reports distinct SIDs and the largest bucket before and after.
    for table in (codes, out):
        Counter(map(tuple, table)).most_common(1)
    return out


def _plain_hash(text: str) -> int:
    state = 0xCBF29CE484222325
    for letter in text.encode():
        state = (state ^ letter) * 0x100000001B3 & _MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)


def _ours(case: Catalogue) -> Resolution:
    return resolve(
        KnnCapConfig(cap=CAP, candidates=CANDIDATES),
        case.codes,
        SIZES,
        item_ids=case.ids,
        candidates=case.candidates,
    )


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def _reset_peak() -> None:
    """Linux: start the peak again at what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20
