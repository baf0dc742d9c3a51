"""Embedding hitrate: the published procedure by brute force, ties as an expectation."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.ragged import Ragged
from forge_ray.sid.metrics import hitrate
from forge_ray.sid.metrics.hitrate import embedding_hitrate, hitrate_of, refit_vectors
from forge_ray.sid.metrics.neighbours import (
    ArrayGallery,
    Neighbours,
    merge_identical,
    merge_neighbours,
    row_hashes,
)
from forge_ray.sid.metrics.sharded import shard_tasks


def brute_force(vectors: np.ndarray, history: list[int], target: int, k: int) -> float:
    """1 − Π over triggers of P(target not in the k nearest others, ties in random order)."""
    # In float64 and rounded far below the distance of two products: identical vectors tie.
    vectors = vectors.astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    missed = 1.0
    for trigger in set(history):
        if trigger == target:
            continue
        others = [item for item in range(len(vectors)) if item != trigger]
        score = np.round(unit @ unit[trigger], 10)
        ahead = sum(score[item] > score[target] for item in others)
        tied = sum(score[item] == score[target] for item in others)
        missed *= 1 - min(max((k - ahead) / tied, 0.0), 1.0)
    return 1 - missed


def draw(seed: int) -> tuple[np.ndarray, list[list[int]], list[int]]:
    rng = np.random.default_rng(seed)
    distinct = rng.normal(size=(rng.integers(2, 12), 6)).astype(np.float32)
    vectors = distinct[rng.integers(0, len(distinct), size=20)]
    histories = [rng.integers(0, 20, size=rng.integers(1, 5)).tolist() for _ in range(6)]
    return vectors, histories, rng.integers(0, 20, size=6).tolist()


@given(st.integers(0, 2**32 - 1), st.integers(1, 25))
def test_equals_brute_force_with_ties(seed: int, k: int) -> None:
    vectors, histories, targets = draw(seed)
    want = [brute_force(vectors, h, t, k) for h, t in zip(histories, targets, strict=True)]
    report = embedding_hitrate(vectors, Ragged.from_lists(histories), np.array(targets), k=k)
    assert report.hitrate == pytest.approx(np.mean(want), abs=1e-9)
    assert report.num_rows == 6


def test_expectation_equals_the_mean_over_all_tie_orders() -> None:
    # Items 1..4 are identical; trigger 0 keeps two of them: each is found in half of the orders.
    vectors = np.array([[1, 0.1], [1, 0], [1, 0], [1, 0], [1, 0], [0, 1]])
    orders = list(itertools.permutations([1, 2, 3, 4]))
    want = np.mean([3 in order[:2] for order in orders])
    report = embedding_hitrate(vectors, Ragged.from_lists([[0]]), np.array([3]), k=2)
    assert report.hitrate == pytest.approx(want)


def test_the_trigger_is_removed_by_id_not_by_rank() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1]])
    rows = Ragged.from_lists([[0], [0]])
    report = embedding_hitrate(vectors, rows, np.array([1, 0]), k=1)
    # Its twin is found with certainty; the trigger itself never is.
    assert report.hitrate == pytest.approx(0.5)


def test_items_outside_the_gallery_are_dropped() -> None:
    vectors = np.eye(3, dtype=np.float32)
    rows = Ragged.from_lists([[10, 99], [99], [10], [20]])
    targets = np.array([20, 20, 99, 30])
    report = embedding_hitrate(vectors, rows, targets, items=np.array([10, 20, 30]), k=2)
    assert (report.num_rows, report.gallery_size) == (2, 3)
    assert report.hitrate == 1.0
    none = embedding_hitrate(vectors, rows, np.full(4, 99), items=np.array([10, 20, 30]))
    assert np.isnan(none.hitrate)


def test_rows_are_weighted() -> None:
    vectors = np.array([[1, 0], [1, 0.1], [0, 1]])
    rows = Ragged.from_lists([[0], [0]])
    report = embedding_hitrate(
        vectors, rows, np.array([1, 2]), k=1, row_weight=np.array([0.25, 0.75])
    )
    assert report.hitrate == pytest.approx(0.25)


def test_blocks_do_not_change_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, histories, targets = draw(3)
    rows = Ragged.from_lists(histories)
    whole = embedding_hitrate(vectors, rows, np.array(targets), k=3).hitrate
    monkeypatch.setattr(hitrate, "_PAIR_BLOCK", 2)
    assert embedding_hitrate(vectors, rows, np.array(targets), k=3).hitrate == whole


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 25))
@settings(max_examples=60)
def test_shards_do_not_change_the_value(seed: int, shard_items: int, k: int) -> None:
    vectors, histories, targets = draw(seed)
    items = np.random.default_rng(seed).permutation(20)
    rows, wanted = Ragged.from_lists(histories), np.array(targets)
    whole = embedding_hitrate(vectors, rows, wanted, items=items, k=k)
    gallery = ArrayGallery(items, vectors, shard_items=shard_items)
    with mock.patch.object(hitrate, "_QUERY_BLOCK", 3):
        sharded = hitrate_of(gallery, rows, wanted, k=k)
    assert sharded.hitrate == pytest.approx(whole.hitrate, abs=1e-12)
    assert (sharded.num_rows, sharded.gallery_size) == (whole.num_rows, whole.gallery_size)


@pytest.mark.ray
def test_ray_tasks_give_the_value_of_one_process(ray_local: None) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(80, 6)).astype(np.float32)[rng.integers(0, 80, size=400)]
    rows = Ragged.from_lists(rng.integers(0, 400, size=(50, 3)))
    targets = rng.integers(0, 400, size=50)
    whole = embedding_hitrate(vectors, rows, targets, k=9)
    gallery = ArrayGallery(np.arange(400), vectors, shard_items=130)
    sharded = hitrate_of(gallery, rows, targets, k=9, tasks=shard_tasks(True))
    assert 0 < whole.hitrate < 1
    assert sharded.hitrate == pytest.approx(whole.hitrate, abs=1e-12)
    assert shard_tasks(False) is map


def test_merging_shards_adds_the_items_of_an_entry_in_both() -> None:
    first = Neighbours(
        np.float32([[0.9, 0.5, -np.inf]]), np.array([[7, 3, 0]]), np.array([[2, 1, 0]])
    )
    second = Neighbours(np.float32([[0.7, 0.5, 0.1]]), np.array([[4, 3, 9]]), np.array([[1, 4, 1]]))
    merged = merge_neighbours(first, second, 3)
    assert merged.names.tolist() == [[7, 4, 3]]
    assert merged.sizes.tolist() == [[2, 1, 5]]
    assert merged.scores[0] == pytest.approx([0.9, 0.7, 0.5])


def test_hashes_tell_vectors_apart_by_any_bit() -> None:
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(1, 8)).astype(np.float32), 257, axis=0)
    bits = vectors.view(np.uint32)
    for row in range(256):
        bits[row, row // 32] ^= np.uint32(1 << (row % 32))
    assert len(np.unique(row_hashes(vectors))) == 257
    entries = merge_identical(np.float32([[1, -0.0], [2, 0], [1, 0], [0, 0]]))
    assert entries.sizes.tolist() == [2, 1, 1]
    assert entries.vectors.tolist() == [[1, 0], [1, 0], [0, 0]]
    assert entries.item_names[0] == entries.item_names[2] == entries.names[0]


def test_hnsw_agrees_with_exact_search() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1500, 16)).astype(np.float32)
    rows = Ragged.from_lists(rng.integers(0, 1500, size=(400, 3)))
    targets = rng.integers(0, 1500, size=400)
    exact = embedding_hitrate(vectors, rows, targets, k=100)
    approximate = embedding_hitrate(vectors, rows, targets, k=100, exact_limit=10)
    assert (exact.method, approximate.method) == ("exact", "hnsw")
    assert approximate.hitrate == pytest.approx(exact.hitrate, abs=0.02)


def test_refit_recovers_additive_codebooks_and_ties_items_of_a_sid() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, size=(600, 3))
    words = [rng.normal(size=(8, 5)) for _ in range(3)]
    vectors = sum(word[codes[:, level]] for level, word in enumerate(words))
    refit = refit_vectors(codes, [8, 8, 8], vectors, sweeps=8)
    assert refit == pytest.approx(vectors, abs=1e-2)
    assert len(np.unique(refit, axis=0)) == len(np.unique(codes, axis=0))


def test_refit_never_gets_worse_with_sweeps() -> None:
    rng = np.random.default_rng(1)
    vectors, codes = rng.normal(size=(300, 6)), rng.integers(0, 4, size=(300, 3))
    errors = [
        ((refit_vectors(codes, [4, 4, 4], vectors, sweeps=n) - vectors) ** 2).sum()
        for n in (1, 2, 4, 8)
    ]
    assert np.all(np.diff(errors) <= 1e-4)
