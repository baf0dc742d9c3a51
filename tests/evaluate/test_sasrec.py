"""SASRec as a baseline: learns, is chosen on validation, is kept, lists what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.ragged import Ragged
from forge_ray.embed.sasrec import SasRec, SasRecConfig, fit_sasrec
from forge_ray.embed.teachers.artifact import train_log
from forge_ray.errors import ConfigError
from forge_ray.evaluate import sasrec
from forge_ray.evaluate.config import EvaluationConfig
from forge_ray.evaluate.floors import evaluate_floors
from forge_ray.evaluate.sasrec import (
    SasRecBaselineConfig,
    SasRecRecommender,
    evaluate_sasrec,
    load_sasrec,
    start_vectors,
    train_sasrec,
)
from tests.evaluate.datasets import topic_dataset

TINY = {"dim": 16, "layers": 1, "heads": 2, "dropout": 0.1, "epochs": 6, "learning_rate": 0.01}


def test_it_learns_and_is_trained_once(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = topic_dataset(store)
    config, wanted = SasRecBaselineConfig(**TINY), EvaluationConfig(ks=[5, 10], split="test")
    found = evaluate_sasrec(dataset, wanted, config, store).metrics
    floor = evaluate_floors(dataset, "test", [10], store)["popularity"]
    # Ten topics: who knows the topic has ten times the chance.
    assert found["ItemHit@10"] > 4 * floor["ItemHit@10"]
    assert found["users"] == 600
    monkeypatch.setattr(sasrec, "fit_sasrec", lambda *_, **__: pytest.fail("trained again"))
    again = evaluate_sasrec(dataset, EvaluationConfig(ks=[5], split="validation"), config, store)
    assert again.metrics["users"] == 600


def test_the_epoch_kept_is_the_best_on_validation(store: ArtifactStore) -> None:
    dataset = topic_dataset(store, num_users=200)
    config = SasRecBaselineConfig(**{**TINY, "epochs": 8})
    artifact = train_sasrec(dataset, config, store)
    curve = [row["figure"] for row in artifact.manifest.metrics["curve"]]
    figure = sasrec.validation_figure(dataset, users=5000)
    kept = figure(SasRecRecommender(load_sasrec(artifact, dataset, config)))
    assert kept == pytest.approx(max(curve))


def test_patience_ends_training() -> None:
    rows = Ragged.from_lists([[0, 1, 2], [1, 2, 3], [2, 3, 4]], dtype=np.int32)
    seen: list[int] = []
    config = SasRecConfig(**{**TINY, "epochs": 9}, patience=2, holdout_share=0)
    fit_sasrec(
        config, rows, 5, report=lambda epoch, _: seen.append(epoch), judge=lambda _: -len(seen)
    )
    assert seen == [0, 1, 2]


def test_users_set_aside_choose_where_a_share_is_given(store: ArtifactStore) -> None:
    dataset = topic_dataset(store, num_users=200)
    config = SasRecBaselineConfig(**TINY, holdout_share=0.2)
    curve = train_sasrec(dataset, config, store).manifest.metrics["curve"]
    assert all("mrr" in row and "figure" not in row for row in curve)


def test_lists_are_the_best_scores_without_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = SasRec(7, SasRecConfig(**TINY)).eval()
    histories = Ragged.from_lists([[3, 4], [0], [5, 1, 2]], dtype=np.int32)
    scores = model.score_all_items(histories)
    order = np.argsort(-scores, axis=1, kind="stable")
    recommender = SasRecRecommender(model)
    assert recommender.recommend(histories, 9, exclude_seen=False)[0].tolist() == [
        *order[0],
        -1,
        -1,
    ]
    lists = recommender.recommend(histories, 7)
    for user, history in enumerate(histories):
        wanted = [item for item in order[user] if item not in history]
        assert lists[user].tolist() == wanted + [-1] * len(history)
    monkeypatch.setattr(sasrec, "_BLOCK_SCORES", 1)
    np.testing.assert_array_equal(recommender.recommend(histories, 7), lists)


@pytest.mark.parametrize(
    ("name", "value"), [("validation_users", 50), ("max_users", 50), ("warm_start", 0.0)]
)
def test_every_setting_of_its_own_matters(store: ArtifactStore, name: str, value: float) -> None:
    dataset = topic_dataset(store, num_users=200)
    base = train_sasrec(dataset, SasRecBaselineConfig(**TINY), store).manifest.metrics["curve"]
    config = SasRecBaselineConfig(**TINY, **{name: value})
    other = train_sasrec(dataset, config, store).manifest.metrics["curve"]
    assert [row["figure"] for row in base] != [row["figure"] for row in other]


def test_warm_starts_are_ppmi_vectors_of_one_length(store: ArtifactStore) -> None:
    dataset = topic_dataset(store)
    config = SasRecBaselineConfig(**TINY, warm_start=0.5)
    rows = start_vectors(train_log(dataset, max_users=1000), config)
    norms = np.linalg.norm(rows, axis=1)
    assert rows.shape == (300, 16)
    assert np.logical_or(np.isclose(norms, 0.5), norms == 0).all()
    unit = rows / np.maximum(norms[:, None], 1e-12)
    same = (unit @ unit.T)[np.arange(300) % 10 == 0][:, np.arange(300) % 10 == 0].mean()
    assert same > (unit @ unit.T).mean() + 0.3


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sasrec\.warm_start must be >= 0"):
        SasRecBaselineConfig(warm_start=-1)
    with pytest.raises(ConfigError, match=r"sasrec\.validation_users must be >= 1"):
        SasRecBaselineConfig(validation_users=0)
