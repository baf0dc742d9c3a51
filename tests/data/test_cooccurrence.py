"""Co-occurrence counts and Swing scores against plain loops."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data import cooccurrence
from forge_ray.data.cooccurrence import swing_scores, window_counts
from forge_ray.data.ragged import Ragged

LOGS = st.lists(st.lists(st.integers(0, 7), max_size=8), max_size=7)


def batches(log: list[list[int]]) -> list[Ragged]:
    half = len(log) // 2
    return [Ragged.from_lists(part, dtype=np.int32) for part in (log[:half], log[half:])]


def swing_by_hand(
    log: list[list[int]], *, smoothing: float, max_history: int, max_users: int
) -> np.ndarray:
    chosen = [sorted(set(user[-max_history:])) for user in log]
    weight = [1 / math.sqrt(max(len(items), 1)) for items in chosen]
    seen: dict[int, int] = defaultdict(int)
    sets: list[set[int]] = []
    for items in chosen:
        kept = set()
        for item in items:
            if seen[item] < max_users:
                kept.add(item)
            seen[item] += 1
        sets.append(kept)
    scores = np.zeros((8, 8))
    for u, v in itertools.combinations(range(len(log)), 2):
        common = sets[u] & sets[v]
        for i, j in itertools.permutations(common, 2):
            scores[i, j] += weight[u] * weight[v] / (smoothing + len(common))
    return scores


@settings(max_examples=60, deadline=None)
@given(LOGS, st.integers(1, 4))
def test_window_counts_equal_a_loop(log: list[list[int]], window: int) -> None:
    expected = np.zeros((8, 8))
    for row in log:
        for i, a in enumerate(row):
            for b in row[i + 1 : i + 1 + window]:
                if a != b:
                    expected[a, b] += 1
                    expected[b, a] += 1
    assert np.array_equal(window_counts(batches(log), 8, window=window).toarray(), expected)


@settings(max_examples=60, deadline=None)
@given(LOGS, st.sampled_from([0.0, 1.0, 3.5]), st.integers(2, 8), st.integers(1, 7))
def test_swing_equals_a_loop(
    log: list[list[int]], smoothing: float, max_history: int, max_users: int
) -> None:
    limits = {"smoothing": smoothing, "max_history": max_history, "max_users": max_users}
    scores = swing_scores(batches(log), 8, **limits)
    np.testing.assert_allclose(scores.toarray(), swing_by_hand(log, **limits), atol=1e-12)


def test_swing_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    log = [rng.integers(0, 50, size=12).tolist() for _ in range(300)]
    limits = {"smoothing": 1.0, "max_history": 10, "max_users": 40}
    whole = swing_scores(batches(log), 50, **limits).toarray()
    monkeypatch.setattr(cooccurrence, "BLOCK_ENTRIES", 500)
    np.testing.assert_allclose(swing_scores(batches(log), 50, **limits).toarray(), whole)
    assert np.count_nonzero(whole) > 1000
    np.testing.assert_allclose(whole, whole.T)


def test_friends_who_agree_on_little_else_count_more() -> None:
    strangers = [[0, 1, 4], [0, 1, 5]]
    clones = [[2, 3, 6, 7], [2, 3, 6, 7]]
    scores = swing_scores(batches(strangers + clones), 8, smoothing=1, max_history=9, max_users=9)
    assert scores[0, 1] > scores[2, 3] > 0
    assert scores[0, 4] == 0
