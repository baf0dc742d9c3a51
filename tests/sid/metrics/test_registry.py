"""The registry names every score there is, and only those."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.config import ParallelConfig, ScoreConfig
from forge_ray.sid.metrics.registry import (
    GROUPS,
    LABELS,
    METRICS,
    audited,
    find_metric,
    is_better,
    rankable,
)
from forge_ray.sid.quantizers.base import TrainingSet
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.score import score_table
from forge_ray.sid.table import SidTable
from tests.evaluate.datasets import topic_dataset


def test_every_score_is_registered_and_every_entry_is_a_score(store: ArtifactStore) -> None:
    dataset = topic_dataset(store)
    quantizer = RqKmeansConfig(levels=2, codebook_size=16).build(8, seed=0)
    quantizer.fit(TrainingSet(dataset.vectors()))
    table = SidTable.from_codes(quantizer.encode(dataset.vectors()), [16, 16])
    config = ScoreConfig(parallel=ParallelConfig(steps=2, users=20))
    rows = [
        score_table(table, dataset, config=config, quantizer=quantizer),
        score_table(table, dataset, config=config),
    ]
    found = set()
    for name in {name for row in rows for name in row} - set(LABELS):
        metric = find_metric(name)
        assert metric is not None or name.endswith("seconds"), name
        found.add(metric.name if metric else name)
    assert set(METRICS) <= found


def test_names_of_levels_and_of_raw_tables_are_found() -> None:
    assert find_metric("usage_level_12") is METRICS["usage_level_*"]
    assert find_metric("raw_gini") is METRICS["gini"]
    assert find_metric("raw_backoff_bits") is None
    assert find_metric("usage_level_x") is None


def test_directions() -> None:
    assert METRICS["backoff_bits"].sign == -1
    assert METRICS["uniqueness"].sign == 1
    assert METRICS["embedding_hitrate_raw"].sign == 0
    assert is_better(METRICS["gini"], 0.1, 0.2)
    assert not is_better(METRICS["uniqueness"], 0.1, 0.2)
    assert {metric.group for metric in METRICS.values()} == set(GROUPS)


def test_only_figures_of_whole_tables_are_audited() -> None:
    names = {metric.name for metric in audited()}
    assert {"backoff_bits", "embedding_hitrate", "lcp_ratio", "parallel_item_hit"} <= names
    assert not {"usage_level_*", "embedding_hitrate_raw", "num_items"} & names


def test_a_gate_takes_safe_scores_only() -> None:
    assert rankable("backoff_bits", field="gate.proxy") is METRICS["backoff_bits"]
    # Unsafe: the ceiling ranks nothing, the ratio has a tiny denominator, a refit memorises.
    for name in ("embedding_hitrate_raw", "lcp_ratio", "embedding_hitrate_refit", "bits"):
        with pytest.raises(ConfigError, match=f"gate.proxy must be one of .*got '{name}'"):
            rankable(name, field="gate.proxy")


def test_gate_safe_scores_have_a_direction_and_controls_have_none() -> None:
    for metric in METRICS.values():
        assert not (metric.gate_safe and metric.better is None)
        assert metric.doc
        if metric.name.endswith(("_se", "_shuffled", "_random")):
            assert metric.better is None


def test_the_documentation_lists_every_score() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    arrows = {"higher": "↑", "lower": "↓", None: ""}
    for metric in METRICS.values():
        gate = "yes" if metric.gate_safe else ""
        assert f"| `{metric.name}` | {arrows[metric.better]} | {gate} |" in page, (
            "docs/metrics.md lags behind the registry: run scripts/metrics_table.py"
        )
