"""Exact embedding hitrate beside a bare faiss flat search of the same queries at equal k.

The bare side gets unit vectors, adds them to an index and searches; ours starts from raw vectors
and ends with the figure. Both ask for k + 1 neighbours, as the trigger has to leave its list. Three
galleries: all vectors distinct (the worst case: nothing to merge), what SIDs with 20 % collisions
decode to, and the first one in four shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from forge_ray.data.ragged import Ragged
from forge_ray.sid.metrics.hitrate import embedding_hitrate, hitrate_of
from forge_ray.sid.metrics.neighbours import ArrayGallery

ITEMS, LISTS, HISTORY, K, TURNS = 100_000, 2_000, 3, 30, 3
WIDTHS = (64, 384)


def run(scale: float) -> dict[str, Any]:
    """Seconds of both sides by gallery."""
    items = max(1000, int(ITEMS * scale))
    return {
        f"{items:,} x {width}, {kind}": compare(items, width, kind)
        for width in WIDTHS
        for kind in ("distinct", "colliding", "four shards")
    }


def compare(items: int, width: int, kind: str) -> dict[str, float]:
    """One gallery."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((items, width), dtype=np.float32)
    if kind == "colliding":
        vectors = vectors[rng.integers(0, int(0.8 * items), items)]
    histories = Ragged.from_lists(rng.integers(0, items, size=(LISTS, HISTORY)))
    targets = rng.integers(0, items, LISTS)
    gallery = ArrayGallery(np.arange(items), vectors, shard_items=-(-items // 4))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = unit[np.unique(histories.values)]
    bare_s, ours_s = [], []
    for _ in range(TURNS):
        bare_s.append(seconds(lambda: bare(unit, queries)))
        if kind == "four shards":
            ours_s.append(seconds(lambda: hitrate_of(gallery, histories, targets, k=K)))
        else:
            ours_s.append(seconds(lambda: embedding_hitrate(vectors, histories, targets, k=K)))
    return {
        "queries": len(queries),
        "faiss_s": round(min(bare_s), 3),
        "ours_s": round(min(ours_s), 3),
        "speed_over_faiss": round(min(bare_s) / min(ours_s), 2),
    }


def bare(unit: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The search and nothing else."""
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    return index.search(queries, K + 1)[1]


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
