"""A ledger's content made by hand, for what reads it."""

from __future__ import annotations

from typing import Any

from forge_ray.sweep.ledger import FinalizeRecord, SweepRecords, TrialRecord

METRIC = "ItemNDCG@10"


def trial(
    number: int, *, state: str = "complete", value: float | None = None, **fields: Any
) -> TrialRecord:
    quality = value if value is not None else 0.01 * number
    proxies = {
        "backoff_bits": 12 - 10 * quality,
        "uniqueness": 0.9,
        "gini": 0.5 + quality,
        "embedding_hitrate": None,
    }
    defaults: dict[str, Any] = {
        "key": f"{number:064x}",
        "point": {"sid.quantizer.kind": "rq_kmeans", "sid.quantizer.levels": number},
        "config": {"sid": {"quantizer": {"levels": number}}, "gr": {"max_steps": 30}},
        "proxies": proxies,
        "history": [
            {"global_step": step, "loss": 1.0, METRIC: quality * step / 20} for step in (10, 20)
        ],
        "attempts": [{"fit": 2.0, "score": 1.0, "train": 30.0, "evaluate": 4.0}],
        "cpus": {"fit": 0.5, "train": 1.0},
    }
    final = {METRIC: value, "ItemHit@10": 2 * value, f"{METRIC}_se": 0.001} if value else {}
    return TrialRecord(
        number=number,
        state=state,  # type: ignore[arg-type]
        value=value if state == "complete" else None,
        **{**defaults, "final": final, **fields},
    )


def records(*trials: TrialRecord, with_test: bool = False) -> SweepRecords:
    floors = {
        "popularity": {METRIC: 0.01, "ItemHit@10": 0.02},
        "item_knn": {METRIC: 0.04, "ItemHit@10": 0.08},
    }
    finalized = [
        FinalizeRecord(
            time="2030-01-01T00:00:00+00:00",
            key=trials[0].key,
            number=trials[0].number,
            winner={METRIC: 0.03, "ItemHit@10": 0.06},
            floors=floors,
        )
    ]
    return SweepRecords(
        trials={one.key: one for one in trials},
        finalized=finalized if with_test else [],
        floors=floors if trials else {},
        sessions=1,
    )
