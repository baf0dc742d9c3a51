"""Coverage against sets of items, and what a part of it costs to send."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.ragged import Ragged
from forge_ray.evaluate.board import Board, Coverage, Ranked
from forge_ray.evaluate.ranking import list_places

KS = (1, 3, 6)


def random_lists(rng: np.random.Generator, num_items: int) -> np.ndarray:
    """Three lists of distinct items, some short."""
    lists = np.full((3, 6), -1)
    for row in lists:
        size = rng.integers(0, min(6, num_items) + 1)
        row[:size] = rng.permutation(num_items)[:size]
    return lists


def covered(lists: list[np.ndarray], num_items: int) -> dict[int, float]:
    shown = {k: {item for one in lists for item in one[:, :k].flat if item >= 0} for k in KS}
    return {k: len(items) / num_items for k, items in shown.items()}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_coverage_equals_sets_however_parts_come_together(seed: int, num_items: int) -> None:
    rng = np.random.default_rng(seed)
    lists = [random_lists(rng, num_items) for _ in range(5)]
    parts = [Coverage(KS, num_items) for _ in lists]
    for part, one in zip(parts, lists, strict=True):
        part.add(one)
    assert parts[0].shares() == covered(lists[:1], num_items)
    parts[0].add(lists[1])
    assert parts[0].shares() == covered(lists[:2], num_items)
    whole = Coverage(KS, num_items)
    for part in (parts[2], parts[0]):
        whole.merge(part)
    whole.add(lists[3])
    assert whole.shares() == covered(lists[:4], num_items)
    parts[4].merge(whole)
    assert parts[4].shares() == covered(lists, num_items)


def test_a_part_is_as_large_as_its_lists_and_not_as_the_catalogue() -> None:
    counts, lists = np.zeros(1_000_000, np.int8), np.arange(200).reshape(20, 10)
    targets = Ragged.from_lists(list(lists[:, 2:3]))
    board = Board(counts, (1, 5, 10))
    board.add(np.arange(20), targets, Ranked(list_places(lists, targets, (10,)), lists), counts)
    assert len(pickle.dumps(board)) < 10_000
    whole = Board(counts, (1, 5, 10))
    whole.merge(board)
    for found in (whole.summary(), board.summary()):
        shares = [found[f"coverage@{k}"] for k in (1, 5, 10)]
        assert shares == [20 / 1e6, 100 / 1e6, 200 / 1e6]
