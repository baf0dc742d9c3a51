"""Behaviour fusion: counts equal brute force, alpha 0 changes nothing, runs repeat byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.ragged import Ragged
from forge_ray.embed.behaviour import behaviour_vectors, cooccurrence, fuse


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 7), max_size=6), max_size=5),
    st.integers(1, 4),
)
def test_counts_equal_brute_force(rows: list[list[int]], window: int) -> None:
    expected = np.zeros((8, 8))
    for row in rows:
        for i, a in enumerate(row):
            for b in row[i + 1 : i + 1 + window]:
                if a != b:
                    expected[a, b] += 1
                    expected[b, a] += 1
    ragged = Ragged.from_lists(rows, dtype=np.int32)
    halves = [ragged.take(np.arange(0, len(rows), 2)), ragged.take(np.arange(1, len(rows), 2))]
    for batches in ([ragged], halves):
        counts = cooccurrence(batches, 8, window=window)
        assert np.array_equal(counts.toarray(), expected)


@pytest.fixture
def communities() -> Ragged:
    """Users who stay inside one of two halves of 40 items."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 20, size=10) + 20 * (user % 2) for user in range(200)]
    return Ragged.from_lists(rows, dtype=np.int32)


def test_items_bought_together_come_close(communities: Ragged) -> None:
    vectors = behaviour_vectors(cooccurrence([communities], 40), 8)
    similarity = vectors @ vectors.T
    assert similarity[:20, :20].mean() > similarity[:20, 20:].mean() + 0.2
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_fusion_keeps_width_and_repeats(communities: Ragged) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    counts = cooccurrence([communities], 40)
    first = fuse(vectors, behaviour_vectors(counts, 8), alpha=0.5)
    second = fuse(vectors, behaviour_vectors(counts, 8), alpha=0.5)
    assert first.shape == vectors.shape
    assert first.tobytes() == second.tobytes()
    assert fuse(vectors, behaviour_vectors(counts, 8), alpha=0) is vectors
    gap = np.linalg.norm(first[:20].mean(0) - first[20:].mean(0))
    assert gap > np.linalg.norm(vectors[:20].mean(0) - vectors[20:].mean(0)) * 0.5


def test_items_without_neighbours_get_zero_rows() -> None:
    counts = cooccurrence([Ragged.from_lists([[0, 1, 0, 1], []], dtype=np.int32)], 5)
    vectors = behaviour_vectors(counts, 3)
    assert np.isfinite(vectors).all()
    assert not vectors[2:].any()
    empty = cooccurrence([Ragged.from_lists([[]], dtype=np.int32)], 5)
    assert not behaviour_vectors(empty, 3).any()
