"""One evaluator for every ranker: parts, workers and slices change nothing but the speed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.evaluate.board import Board, Ranked
from forge_ray.evaluate.config import EvaluationConfig
from forge_ray.evaluate.evaluator import Ready, evaluate
from forge_ray.evaluate.floors import ListRanker, fit_item_knn
from forge_ray.evaluate.item_knn import ItemKnnConfig
from forge_ray.evaluate.ranking import list_places
from tests.evaluate.datasets import topic_dataset, write_dataset


def knn_board(store: ArtifactStore, config: EvaluationConfig) -> dict[str, float]:
    dataset = topic_dataset(store)
    knn = fit_item_knn(dataset, ItemKnnConfig())
    found = evaluate(Ready(ListRanker(knn, config.ks, config.exclude_seen)), dataset, config)
    return {name: value for name, value in found.summary().items() if name != "users_per_s"}


def test_the_size_of_parts_changes_nothing(store: ArtifactStore) -> None:
    whole = knn_board(store, EvaluationConfig(ks=[5, 20], bootstrap=50))
    small = knn_board(store, EvaluationConfig(ks=[5, 20], bootstrap=50, users_per_part=37))
    assert small == pytest.approx(whole)
    assert whole["users"] == 600
    assert whole["ItemHit@5_low"] < whole["ItemHit@5"] < whole["ItemHit@5_high"]


@pytest.mark.ray
def test_workers_give_the_figures_of_one_process(store: ArtifactStore, ray_local: None) -> None:
    options = {"ks": [5, 20], "bootstrap": 50, "users_per_part": 100, "split": "test"}
    here = knn_board(store, EvaluationConfig(**options))
    spread = EvaluationConfig(**options, num_workers=2, cpus_per_worker=0.5)
    assert knn_board(store, spread) == here


@dataclass(frozen=True)
class NotedOpener:
    """Leaves a file each time that a process opens the ranker."""

    folder: Path
    ranker: ListRanker

    def __call__(self) -> ListRanker:
        (self.folder / f"{os.getpid()}-{uuid4().hex}").touch()
        return self.ranker


@pytest.mark.ray
def test_a_worker_opens_the_ranker_once(
    store: ArtifactStore, ray_local: None, tmp_path: Path
) -> None:
    dataset = topic_dataset(store)
    ranker = ListRanker(fit_item_knn(dataset, ItemKnnConfig()), [5], True)
    options = {"ks": [5], "bootstrap": 0, "num_workers": 2, "cpus_per_worker": 0.5}
    config = EvaluationConfig(**options, users_per_part=30)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        evaluate(NotedOpener(tmp_path / name, ranker), dataset, config)
        processes = [path.name.split("-")[0] for path in (tmp_path / name).iterdir()]
        # 20 parts; another evaluation in the same processes opens its own ranker.
        assert 0 < len(processes) == len(set(processes)) < 20


def test_cold_targets_have_a_slice_of_their_own(store: ArtifactStore) -> None:
    # Item 4 is only ever a test target: nobody took it in the train part.
    sequences = Ragged.from_lists([[0, 1, 2, 4], [1, 2, 3, 0], [2, 3, 0, 1]], dtype=np.int32)
    dataset = write_dataset(store, sequences, item_ids=np.array(list("abcde")))
    config = EvaluationConfig(split="test", ks=[1, 5], bootstrap=0, tail_max_count=1)
    knn = fit_item_knn(dataset, ItemKnnConfig())
    found = evaluate(Ready(ListRanker(knn, config.ks, True)), dataset, config).summary()
    assert found["users/cold"] == 1
    assert found["users/head"] + found["users/tail"] == 3
    assert found["ItemHit@1/cold"] == 0
    # With the whole catalogue in the list, popularity brings it in last.
    assert found["ItemHit@5/cold"] == 1


def test_tail_and_split_and_sample_are_settings(store: ArtifactStore) -> None:
    base = knn_board(store, EvaluationConfig(ks=[5], bootstrap=0))
    for change in ({"tail_max_count": 40}, {"users": 70}, {"split": "test"}):
        assert knn_board(store, EvaluationConfig(ks=[5], bootstrap=0, **change)) != base
    assert knn_board(store, EvaluationConfig(ks=[5], users=70))["users"] == 70


def test_ranked_sids_have_figures_of_their_written_list(store: ArtifactStore) -> None:
    counts, targets = np.ones(6, np.int64), Ragged.from_lists([[2], [3]])
    lists = np.array([[1, 2, 0], [4, 5, -1]])
    places = list_places(lists, targets, [1, 3])
    board = Board(counts, [1, 3])
    ranked = Ranked(places, lists, is_sid=True, emitted=5, invalid=1, seconds=2.0)
    board.add(np.arange(2), targets, ranked, counts)
    found = board.summary()
    assert (found["ItemHit@3"], found["HR@3"], found["HR@1"]) == (0.5, 0.5, 0.0)
    assert found["ListNDCG@3"] == found["ItemNDCG@3"] == pytest.approx(0.5 / np.log2(3))
    assert (found["invalid_rate"], found["short_rate"], found["users_per_s"]) == (0.2, 0.5, 1.0)
    assert found["coverage@1"] == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "train"}, "validation or test, got 'train'"),
        ({"ks": []}, "ks must be cut-offs >= 1"),
        ({"users_per_part": 0}, "users_per_part must be >= 1"),
        ({"tail_max_count": -1}, "tail_max_count must be >= 0"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(**changes)


def test_running_settings_are_no_part_of_the_identity() -> None:
    one = EvaluationConfig(ks=[10, 5, 5])
    other = EvaluationConfig(ks=[5, 10], num_workers=3, cpus_per_worker=2, users_per_part=7)
    assert one.common() == other.common()
    assert one.common() != EvaluationConfig(ks=[5, 10], bootstrap=7).common()
