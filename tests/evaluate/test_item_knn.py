"""Item-kNN: the stated formula by brute force, blocks and merging without effect."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.evaluate import item_knn
from forge_ray.evaluate.item_knn import (
    ItemKnn,
    ItemKnnConfig,
    blocks_of_pairs,
    count_items,
    tune,
)

NUM_ITEMS = 15


@pytest.fixture
def train() -> Ragged:
    rng = np.random.default_rng(0)
    rows = [rng.choice(NUM_ITEMS - 2, size=rng.integers(0, 9), replace=False) for _ in range(20)]
    return Ragged.from_lists(rows, dtype=np.int32)


@pytest.fixture
def train_counts(train: Ragged) -> np.ndarray:
    return np.bincount(train.values, minlength=NUM_ITEMS)


def brute_force_scores(train: Ragged, history: list[int], max_length: int) -> np.ndarray:
    count = Counter(train.values.tolist())
    together: Counter[tuple[int, int]] = Counter()
    follows: Counter[tuple[int, int]] = Counter()
    for row in train:
        items = row.tolist()
        follows.update(pairwise(items))
        if len(items) <= max_length:
            together.update((a, b) for a in items for b in items if a != b)
    scores = np.zeros(NUM_ITEMS)
    for item in range(NUM_ITEMS):
        for age, anchor in enumerate(reversed(history[-10:])):
            scale = np.sqrt(max(count[anchor], 1) * max(count[item], 1))
            scores[item] += 0.7**age * together[anchor, item] / scale
            if age == 0:
                scores[item] += follows[anchor, item] / scale
    return scores


@pytest.mark.parametrize("max_length", [60, 5])
def test_lists_equal_brute_force(train: Ragged, train_counts: np.ndarray, max_length: int) -> None:
    rng = np.random.default_rng(1)
    histories = [rng.choice(NUM_ITEMS, size=n, replace=False) for n in (1, 3, 6, 12)]
    knn = ItemKnn.fit(count_items(train, NUM_ITEMS, max_length=max_length), train_counts)
    lists = knn.recommend(Ragged.from_lists(histories, dtype=np.int32), 4)
    for history, found in zip(histories, lists, strict=True):
        scores = brute_force_scores(train, history.tolist(), max_length)
        # Unscored items follow by popularity; seen ones never appear.
        key = [
            (-round(scores[i], 6), -train_counts[i] if scores[i] == 0 else 0, i)
            for i in range(NUM_ITEMS)
        ]
        want = sorted((i for i in range(NUM_ITEMS) if i not in history), key=key.__getitem__)[:4]
        assert np.sort(scores[found[found >= 0]])[::-1] == pytest.approx(scores[want], abs=1e-6)
        assert not set(found.tolist()) & set(history.tolist())
        unscored = [i for i in found.tolist() if i >= 0 and scores[i] == 0]
        assert unscored == [i for i in want if scores[i] == 0]


def test_counts_add_over_blocks_of_users(train: Ragged) -> None:
    whole = count_items(train, NUM_ITEMS)
    parts = count_items(train.take(np.arange(8)), NUM_ITEMS) + count_items(
        train.take(np.arange(8, 20)), NUM_ITEMS
    )
    assert np.array_equal(whole.together.toarray(), parts.together.toarray())
    assert np.array_equal(whole.next.toarray(), parts.next.toarray())


def test_block_size_does_not_change_the_lists(train: Ragged, train_counts: np.ndarray) -> None:
    knn = ItemKnn.fit(count_items(train, NUM_ITEMS), train_counts)
    assert np.array_equal(knn.recommend(train, 5), knn.recommend(train, 5, block_users=3))


def test_an_empty_history_gets_popularity(train: Ragged, train_counts: np.ndarray) -> None:
    knn = ItemKnn.fit(count_items(train, NUM_ITEMS), train_counts)
    found = knn.recommend(Ragged.from_lists([[]], dtype=np.int32), 3)
    assert found[0].tolist() == knn.order[:3].tolist()


def test_seen_items_stay_in_on_request(train: Ragged, train_counts: np.ndarray) -> None:
    knn = ItemKnn.fit(count_items(train, NUM_ITEMS), train_counts)
    lists = knn.recommend(train, NUM_ITEMS, exclude_seen=False)
    assert (np.sort(lists, axis=1) == np.arange(NUM_ITEMS)).all()
    hidden = knn.recommend(train, NUM_ITEMS)
    assert ((hidden >= 0).sum(axis=1) == NUM_ITEMS - train.lengths).all()


def test_tuning_finds_the_best_constants_of_its_path(
    train: Ragged, train_counts: np.ndarray
) -> None:
    knn = ItemKnn.fit(count_items(train, NUM_ITEMS), train_counts)
    wanted = ItemKnnConfig(history=3, decay=0.9, succession=2.0)

    def figure(one: ItemKnn) -> float:
        found, best = one.config, wanted
        return -sum(
            abs(getattr(found, name) - getattr(best, name))
            for name in ("history", "decay", "succession")
        )

    assert tune([knn], figure) == wanted
    assert tune([knn], lambda _: 0.0) == knn.config
    far, near = (replace(knn, config=replace(wanted, max_length=one)) for one in (60, 200))
    starts, asked = [replace(far, config=replace(far.config, history=50)), near], []
    best = tune(iter(starts), lambda one: asked.append(one.config) or figure(one))
    assert best == near.config
    assert len(asked) == len(set(asked))


def test_blocks_hold_few_pairs_and_all_users(
    train: Ragged, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int(np.median(train.lengths))
    pairs = np.where(train.lengths <= limit, train.lengths.astype(np.int64) ** 2, 0)
    bound = int(pairs.max())
    monkeypatch.setattr(item_knn, "_BLOCK_PAIRS", bound)
    blocks = list(blocks_of_pairs(train, max_length=limit))
    assert Ragged.concatenate(blocks) == train
    assert len(blocks) > 2
    for block in blocks:
        short = block.lengths[block.lengths <= limit].astype(np.int64)
        assert (short**2).sum() < 2 * bound
    merged = reduce(add, (count_items(one, NUM_ITEMS, max_length=limit) for one in blocks))
    whole = count_items(train, NUM_ITEMS, max_length=limit)
    for name in ("together", "next"):
        assert (getattr(merged, name) != getattr(whole, name)).nnz == 0
    (empty,) = blocks_of_pairs(train.take(np.arange(0)), max_length=limit)
    assert len(empty) == 0


@pytest.mark.parametrize("values", [{"history": 0}, {"decay": 0.0}, {"succession": -1.0}])
def test_bad_constants_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match="item_knn"):
        ItemKnnConfig(**values)
