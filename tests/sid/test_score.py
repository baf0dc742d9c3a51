"""Scoring a table: names, splits, controls, caching, and the published table of Amazon Beauty."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.sid import score
from forge_ray.sid.config import SidConfig
from forge_ray.sid.metrics.config import ParallelConfig
from forge_ray.sid.quantizers.base import TrainingSet
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.score import (
    ScoreConfig,
    control_table,
    load_inputs,
    score_sids,
    score_table,
)
from forge_ray.sid.table import SidTable
from tests.evaluate.datasets import beauty_dataset, topic_dataset, write_dataset

# methods.md 8.3: distinct SIDs and bits of the test form.
PUBLISHED = {
    "rkmeans_native": (10_527, 12.204),
    "rkmeans_zcr": (12_101, 12.198),
    "rkmeans_zcr_cf": (12_101, 11.967),
    "rqvae_native": (11_499, 12.272),
    "letter_native": (12_015, 12.215),
    "quasid_native": (12_064, 12.233),
    "mql4grec": (12_101, 12.401),
}
RANDOM_BITS = 12.908


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return topic_dataset(store)


@pytest.fixture
def quantizer(dataset: Dataset) -> Any:
    fitted = RqKmeansConfig(levels=2, codebook_size=16).build(8, seed=0)
    fitted.fit(TrainingSet(dataset.vectors()))
    return fitted


@pytest.fixture
def table(dataset: Dataset, quantizer: Any) -> SidTable:
    return SidTable.from_codes(quantizer.encode(dataset.vectors()), [16, 16])


def test_names_and_directions(dataset: Dataset, table: SidTable, quantizer: Any) -> None:
    found = score_table(table, dataset, quantizer=quantizer)
    for name in (
        "uniqueness",
        "gini",
        "max_bucket",
        "usage_level_2",
        "perplexity_level_1",
        "prefixes_2",
        "raw_uniqueness",
        "backoff_bits_tail",
    ):
        assert name in found
    assert found["split"] == "validation"
    assert found["embedding_hitrate_variant"] == "decoded"
    assert found["embedding_hitrate"] == found["embedding_hitrate_decoded"]
    assert found["embedding_hitrate_codes"] == found["embedding_hitrate_decoded"]
    assert found["embedding_hitrate_refit"] is None
    assert found["embedding_hitrate_raw"] > 0.5
    assert found["backoff_gain"] > 0.5
    assert found["backoff_bits_shuffled"] == pytest.approx(found["backoff_bits_random"], abs=0.3)
    json.dumps(found, allow_nan=False)


def test_shuffling_keeps_symbols_and_loses_behaviour(dataset: Dataset, table: SidTable) -> None:
    shuffled = SidTable.from_codes(
        np.random.default_rng(1).permutation(table.codes), table.codebook_sizes
    )
    inputs = load_inputs(dataset)
    own = score_table(table, dataset, inputs=inputs)
    other = score_table(shuffled, dataset, inputs=inputs)
    for name in ("uniqueness", "gini", "usage_level_1", "perplexity_level_2", "prefixes_2"):
        assert own[name] == pytest.approx(other[name])
    assert own["backoff_bits"] < other["backoff_bits"] - 0.5
    assert own["embedding_hitrate"] > 2 * other["embedding_hitrate"]


def test_levels_are_measured_before_resolution(dataset: Dataset, table: SidTable) -> None:
    extra = np.arange(table.num_items) % 64
    resolved = SidTable.from_codes(np.column_stack([table.codes, extra]), [16, 16, 64])
    found = score_table(resolved, dataset, raw=table)
    alone = score_table(table, dataset)
    assert found["raw_uniqueness"] == alone["uniqueness"] < found["uniqueness"]
    assert found["usage_level_2"] == alone["usage_level_2"]
    assert "usage_level_3" not in found
    assert "backoff_mixture_3" in found


def test_an_extra_token_is_not_decoded(dataset: Dataset, table: SidTable, quantizer: Any) -> None:
    extra = np.arange(table.num_items) % 64
    resolved = SidTable.from_codes(np.column_stack([table.codes, extra]), [16, 16, 64])
    plain = score_table(table, dataset, quantizer=quantizer)["embedding_hitrate"]
    found = score_table(resolved, dataset, raw=table, quantizer=quantizer)
    assert found["embedding_hitrate"] == plain


def test_validation_scores_never_read_the_test_split(
    dataset: Dataset, table: SidTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    batches = Dataset.sequence_batches

    def spy(self: Dataset, split: str, **kwargs: Any) -> Any:
        read.append(split)
        return batches(self, split, **kwargs)

    monkeypatch.setattr(Dataset, "sequence_batches", spy)
    score_table(table, dataset)
    assert set(read) == {"train", "validation"}
    assert score_table(table, dataset, split="test")["split"] == "test"


def test_halves_of_the_validation_users_are_disjoint(dataset: Dataset) -> None:
    probe = load_inputs(dataset).probe
    assert len(probe.fit.target) == len(probe.score.target) == 300
    both = np.concatenate([probe.fit.target, probe.score.target])
    want = next(dataset.sequence_batches("validation")).targets.values
    assert np.array_equal(np.sort(both), np.sort(want))


def test_a_small_gallery_keeps_the_listed_items(dataset: Dataset) -> None:
    config = ScoreConfig(hitrate_gallery=40, hitrate_users=4)
    rows = load_inputs(dataset, config=config).hitrate
    assert rows is not None
    listed = set(rows.histories.values.tolist()) | set(rows.targets.tolist())
    assert listed < set(rows.items.tolist())
    assert len(rows.items) == 40
    assert np.array_equal(rows.raw_vectors(), dataset.vectors()[rows.items])


def test_without_vectors_hitrate_is_none(store: ArtifactStore, dataset: Dataset) -> None:
    from forge_ray.data.ragged import Ragged

    rows = Ragged.from_lists(np.random.default_rng(0).integers(0, 9, size=(40, 5)), dtype=np.int32)
    bare = write_dataset(store, rows, item_ids=np.arange(9), name="bare")
    found = score_table(SidTable.from_codes(np.arange(9)[:, None], [16]), bare)
    assert found["embedding_hitrate"] is None
    assert found["embedding_hitrate_raw"] is None
    assert found["embedding_hitrate_variant"] == "none"


def test_mistakes_are_refused(dataset: Dataset, table: SidTable) -> None:
    with pytest.raises(ConfigError, match="must code the dataset's 300 items, got 10"):
        score_table(SidTable.from_codes(table.codes[:10], [16, 16]), dataset)
    with pytest.raises(ConfigError, match="validation or test, got 'train'"):
        load_inputs(dataset, split="train")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"score.hitrate_k must be >= 1, got 0"):
        ScoreConfig(hitrate_k=0)


@pytest.mark.parametrize(
    "change",
    [
        {"max_users": 100},
        {"max_train_users": 50},
        {"hitrate_users": 100},
        {"hitrate_k": 3},
        {"hitrate_history": 1},
        {"hitrate_gallery": 100},
        {"hitrate_exact_limit": 1},
        {"sample_items": 50},
        {"order_triplets": 100},
        {"parallel": ParallelConfig(steps=2, users=20)},
        {"probe_history": 1},
        {"probe_window": 1},
        {"probe_decay": 0.1},
        {"probe_steps": 1},
        {"tail_max_count": 10},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_matters(dataset: Dataset, table: SidTable, change: dict[str, Any]) -> None:
    def scores(config: ScoreConfig) -> dict[str, Any]:
        found = score_table(table, dataset, config=config)
        return {name: value for name, value in found.items() if not name.endswith("seconds")}

    assert scores(ScoreConfig(**change)) != scores(ScoreConfig())


def test_hitrate_by_depth_and_what_quantizing_lost(
    dataset: Dataset, table: SidTable, quantizer: Any
) -> None:
    found = score_table(table, dataset, quantizer=quantizer)
    assert 0 < found["embedding_hitrate_prefix_1"] <= found["embedding_hitrate"] + 0.05
    assert "embedding_hitrate_prefix_2" not in found
    gap = found["embedding_hitrate_raw"] - found["embedding_hitrate"]
    assert found["embedding_hitrate_gap"] == pytest.approx(gap)
    assert 0 < found["reconstruction_r2_1"] < found["reconstruction_r2_2"] < 1
    restored = quantizer.decode(np.asarray(table.codes))
    vectors = dataset.vectors()
    lost = ((vectors - restored) ** 2).sum() / ((vectors - vectors.mean(axis=0)) ** 2).sum()
    assert found["reconstruction_r2"] == pytest.approx(1 - lost, rel=1e-4)


def test_shards_change_no_score(dataset: Dataset, table: SidTable, quantizer: Any) -> None:
    def hitrates(shard: int) -> dict[str, Any]:
        config = ScoreConfig(hitrate_shard=shard)
        found = score_table(table, dataset, config=config, quantizer=quantizer)
        return {
            name: value
            for name, value in found.items()
            if name.startswith("embedding_hitrate") and isinstance(value, float)
        }

    whole = hitrates(300)
    assert len(whole) >= 7
    for shard in (1, 70):
        assert hitrates(shard) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_controls_keep_buckets_and_lose_meaning(
    dataset: Dataset, table: SidTable, control: Any
) -> None:
    inputs = load_inputs(dataset)
    own = score_table(table, dataset, inputs=inputs)
    made = score_table(control_table(table, control, seed=1), dataset, inputs=inputs)
    for name in ("num_sids", "uniqueness", "gini", "colliding_items", "max_bucket"):
        assert made[name] == pytest.approx(own[name])
    assert made["order_agreement"] == pytest.approx(0.5, abs=0.05)
    assert own["order_agreement"] > 0.7
    assert made["lcp_ratio"] < 1.5 < own["lcp_ratio"]
    assert abs(made["backoff_gain"]) < 0.2 < own["backoff_gain"]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 4}, {"batch_users": 9}, {"history": 3}, {"width": 8}, {"layers": 1},
        {"heads": 2}, {"dropout": 0.5}, {"temperature": 0.5}, {"learning_rate": 0.1},
        {"users": 30}, {"k": 3},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_setting_of_the_parallel_probe_matters(
    dataset: Dataset, table: SidTable, change: dict[str, Any]
) -> None:
    def scores(**settings: Any) -> dict[str, Any]:
        parallel = ParallelConfig(**{"steps": 3, "users": 20, "width": 16, **settings})
        found = score_table(table, dataset, config=ScoreConfig(parallel=parallel))
        return {name: found[name] for name in found if name.startswith("parallel_item")} | {
            "bits": found["parallel_bits"]
        }

    assert scores(**change) != scores()


def test_scores_of_an_artifact_are_computed_once(
    store: ArtifactStore,
    dataset: Dataset,
    table: SidTable,
    quantizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = store.build("sids", "toy", {}, produce=lambda _: None)
    sids: Any = SimpleNamespace(
        table=table,
        raw=table,
        artifact=artifact,
        quantizer_artifact=None,
        config=SidConfig(),
    )
    monkeypatch.setattr(score, "_quantizer", lambda _: quantizer)
    shuffled = score_sids(sids, dataset, store, control="shuffled").manifest.metrics
    first = score_sids(sids, dataset, store).manifest.metrics
    assert first["backoff_bits"] < shuffled["backoff_bits"] - 0.5
    assert first["embedding_hitrate_variant"] == "decoded"
    assert first["seconds"] > 0
    monkeypatch.setattr(score, "score_table", lambda *_, **__: pytest.fail("scored again"))
    assert score_sids(sids, dataset, store).manifest.metrics == first


def test_amazon_beauty_reproduces_the_published_table(
    shared_data: Path, store: ArtifactStore
) -> None:
    dataset = beauty_dataset(store, shared_data / "amazon-beauty")
    config = ScoreConfig(hitrate_users=500)
    inputs = load_inputs(dataset, split="test", config=config)
    for name, (num_sids, bits) in PUBLISHED.items():
        path = shared_data / "amazon-beauty" / "sid_indexes" / f"{name}.npz"
        table = SidTable.from_npz(path, dataset.item_ids())
        found = score_table(table, dataset, config=config, inputs=inputs)
        assert found["num_sids"] == num_sids
        assert found["backoff_bits"] == pytest.approx(bits, abs=0.002)
        # A colliding table's buckets cost a random assignment bits too: compare like with like.
        assert found["backoff_bits_shuffled"] == pytest.approx(
            found["backoff_bits_random"], abs=0.03
        )
        if found["uniqueness"] > 0.94:
            assert found["backoff_bits_shuffled"] == pytest.approx(RANDOM_BITS, abs=0.03)
