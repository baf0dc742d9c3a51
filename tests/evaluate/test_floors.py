"""The floors: the figures everyone can recompute on Amazon Beauty, and caching."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import SequenceBatch
from forge_ray.errors import ConfigError
from forge_ray.evaluate import floors
from forge_ray.evaluate.floors import FloorsConfig, evaluate_floors, measure_floors
from tests.evaluate.datasets import beauty_dataset, topic_dataset


def test_floors_are_measured_once(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = topic_dataset(store)
    first = evaluate_floors(dataset, "validation", (10, 5, 5), store)
    monkeypatch.setattr(floors, "measure_floors", lambda *_: pytest.fail("measured again"))
    assert evaluate_floors(dataset, "validation", (5, 10), store) == first
    assert set(first) == {"popularity", "item_knn"}
    # Ten topics of thirty items: neighbours know the topic, popularity does not.
    assert first["item_knn"]["ItemHit@10"] > 3 * first["popularity"]["ItemHit@10"]
    assert first["item_knn"]["users"] == 600
    assert 0 < first["popularity"]["coverage@10"] < first["item_knn"]["coverage@10"] <= 1


def test_streaming_in_small_batches_changes_nothing(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = topic_dataset(store)
    config = FloorsConfig(split="test", ks=[5])
    whole = measure_floors(dataset, config)
    batches = dataset.sequence_batches
    monkeypatch.setattr(
        type(dataset), "sequence_batches", lambda _, split, **__: batches(split, batch_rows=37)
    )
    for name, metrics in measure_floors(dataset, config).items():
        assert metrics == pytest.approx(whole[name])


def test_a_target_taken_twice_counts_once() -> None:
    """As for models; a repeat would lift NDCG above 1."""
    board = floors._Board(5, FloorsConfig(ks=[2]))
    histories = Ragged.from_lists([[0]], dtype=np.int32)
    batch = SequenceBatch(np.zeros(1, np.int64), histories, Ragged.from_lists([[3, 3]]))
    board.add(batch, np.array([[3, 1]]), np.ones(5, np.int64))
    assert board.summary()["ItemNDCG@2"] == pytest.approx(1.0)
    assert board.summary()["ItemHit@2"] == 1.0


@pytest.mark.parametrize(
    ("field", "values"),
    [("history", 1), ("decay", 0.01), ("max_length", 2), ("tail_max_count", 40)],
)
def test_every_setting_matters(store: ArtifactStore, field: str, values: float) -> None:
    dataset = topic_dataset(store, num_users=200)
    base = measure_floors(dataset, FloorsConfig(ks=[5, 20]))
    other = measure_floors(dataset, FloorsConfig(ks=[5, 20], **{field: values}))
    assert other != base


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="validation or test, got 'train'"):
        FloorsConfig(split="train")
    with pytest.raises(ConfigError, match=">= 1"):
        FloorsConfig(ks=[])


def test_amazon_beauty_floors(shared_data: Path, store: ArtifactStore) -> None:
    dataset = beauty_dataset(store, shared_data / "amazon-beauty")
    found = evaluate_floors(dataset, "test", (5, 10), store)
    names = ("ItemHit@5", "ItemNDCG@5", "ItemHit@10", "ItemNDCG@10")
    popularity = [found["popularity"][name] for name in names]
    item_knn = [found["item_knn"][name] for name in names]
    assert np.allclose(popularity, (0.0075, 0.0041, 0.0115, 0.0055), atol=1e-4)
    assert np.allclose(item_knn, (0.0560, 0.0414, 0.0749, 0.0474), atol=2e-4)
