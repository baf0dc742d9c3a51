"""The floors: the figures everyone can recompute on Amazon Beauty, caching, tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import to_mapping
from forge_ray.data.ragged import Ragged
from forge_ray.evaluate import evaluator
from forge_ray.evaluate.config import EvaluationConfig
from forge_ray.evaluate.floors import (
    evaluate_floors,
    evaluate_item_knn,
    fit_item_knn,
    tuned_item_knn,
    validation_figure,
)
from forge_ray.evaluate.item_knn import ItemKnnConfig
from tests.evaluate.datasets import beauty_dataset, topic_dataset, write_dataset


def test_floors_are_measured_once(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = topic_dataset(store)
    first = evaluate_floors(dataset, "validation", (10, 5, 5), store)
    monkeypatch.setattr(evaluator, "evaluate", lambda *_: pytest.fail("measured again"))
    assert evaluate_floors(dataset, "validation", (5, 10), store) == first
    assert set(first) == {"popularity", "item_knn"}
    # Ten topics of thirty items: neighbours know the topic, popularity does not.
    assert first["item_knn"]["ItemHit@10"] > 3 * first["popularity"]["ItemHit@10"]
    assert first["item_knn"]["users"] == 600
    assert 0 < first["popularity"]["coverage@10"] < first["item_knn"]["coverage@10"] <= 1
    assert first["item_knn"]["HR@10"] == first["item_knn"]["ItemHit@10"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("history", 1), ("decay", 0.01), ("max_length", 2), ("succession", 0.0)],
)
def test_every_constant_matters(store: ArtifactStore, field: str, value: float) -> None:
    dataset = topic_dataset(store, num_users=200)
    config = EvaluationConfig(ks=[5, 20], bootstrap=0)
    base = evaluate_item_knn(dataset, config, ItemKnnConfig(), store).metrics
    other = evaluate_item_knn(dataset, config, ItemKnnConfig(**{field: value}), store).metrics
    assert {n: v for n, v in other.items() if "Item" in n} != {
        n: v for n, v in base.items() if "Item" in n
    }


def test_tuned_constants_are_no_worse_on_validation_and_kept(store: ArtifactStore) -> None:
    dataset = topic_dataset(store, num_users=200)
    found = tuned_item_knn(dataset, store)
    figure = validation_figure(dataset, users=200)
    floor, tuned = (figure(fit_item_knn(dataset, one)) for one in (ItemKnnConfig(), found))
    assert tuned >= floor
    assert store.manifests("baseline")[0].metrics["item_knn"] == to_mapping(found)
    assert tuned_item_knn(dataset, store) == found


def test_long_histories_are_counted_where_it_pays(store: ArtifactStore) -> None:
    """Users of a hundred items each: the floor's limit of 60 leaves out all of them."""
    rng = np.random.default_rng(0)
    topics = np.arange(400).reshape(4, 100)
    # Shuffled, so that what follows what says less than what goes with what.
    rows = [rng.permutation(topics[user % 4])[:80] for user in range(60)]
    ids = np.array([f"i{number:03d}" for number in range(400)])
    dataset = write_dataset(store, Ragged.from_lists(rows, dtype=np.int32), item_ids=ids)
    assert tuned_item_knn(dataset, store).max_length > 60


def test_amazon_beauty_floors(shared_data: Path, store: ArtifactStore) -> None:
    dataset = beauty_dataset(store, shared_data / "amazon-beauty")
    found = evaluate_floors(dataset, "test", (5, 10), store)
    names = ("ItemHit@5", "ItemNDCG@5", "ItemHit@10", "ItemNDCG@10")
    popularity = [found["popularity"][name] for name in names]
    item_knn = [found["item_knn"][name] for name in names]
    assert np.allclose(popularity, (0.0075, 0.0041, 0.0115, 0.0055), atol=1e-4)
    assert np.allclose(item_knn, (0.0560, 0.0414, 0.0749, 0.0474), atol=2e-4)
