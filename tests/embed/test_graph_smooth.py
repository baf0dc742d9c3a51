"""Smoothing and its graphs against dense algebra and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from forge_ray.embed import graph_smooth
from forge_ray.embed.graph_smooth import (
    GraphSmoothConfig,
    nearest,
    smooth,
    strongest,
    unweighted,
)
from forge_ray.errors import ConfigError


def drawn(num_items: int = 60, dim: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_items, dim)).astype(np.float32)


def counts_of(num_items: int = 60) -> sp.csr_array:
    rng = np.random.default_rng(1)
    dense = np.triu(
        rng.integers(0, 5, size=(num_items, num_items)) * (rng.random((num_items,) * 2) < 0.3), 1
    )
    dense[:, 7] = dense[7] = 0
    return sp.csr_array((dense + dense.T).astype(np.float64))


@pytest.mark.parametrize("block", [11, 10**6])
def test_smoothing_equals_dense_algebra(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_smooth, "BLOCK_ENTRIES", block)
    vectors, counts = drawn(), counts_of()
    dense = counts.toarray()
    normalised = dense / np.maximum(dense.sum(axis=1, keepdims=True), 1)
    expected = vectors + 0.7 * normalised @ vectors
    np.testing.assert_allclose(smooth(vectors, counts, gamma=0.7), expected, atol=1e-5)
    assert np.array_equal(smooth(vectors, counts, gamma=0.7)[7], vectors[7])
    assert smooth(vectors, counts, gamma=0) is vectors


@pytest.mark.parametrize("block", [50, 10**6])
def test_strongest_equals_sorting(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_smooth, "BLOCK_ENTRIES", block)
    counts = counts_of()
    kept = strongest(counts, 4).toarray()
    for row, own in zip(counts.toarray(), kept, strict=True):
        best = sorted((-value, column) for column, value in enumerate(row) if value)[:4]
        assert {column: -value for value, column in best} == {
            column: value for column, value in enumerate(own) if value
        }


def brute_force(vectors: np.ndarray, limit: int) -> list[set[int]]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return [set(row) for row in np.argsort(-similarity, axis=1)[:, :limit].tolist()]


@pytest.mark.parametrize("block", [40, 10**6])
def test_nearest_equals_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_smooth, "BLOCK_ENTRIES", block)
    vectors = drawn() * np.linspace(0.1, 3, 60, dtype=np.float32)[:, None]
    graph = nearest(vectors, 4)
    found = [set(graph.indices[a:b]) for a, b in zip(graph.indptr, graph.indptr[1:], strict=False)]
    assert found == brute_force(vectors, 4)
    assert set(unweighted(graph).data) == {1.0}


def test_nearest_leaves_the_item_itself_out_among_identical_ones() -> None:
    graph = nearest(np.ones((30, 3), dtype=np.float32), 5)
    assert np.array_equal(np.diff(graph.indptr), np.full(30, 5))
    rows = np.repeat(np.arange(30), 5)
    assert (graph.indices != rows).all()
    assert nearest(drawn(3), 10).nnz == 6


def test_beyond_the_exact_limit_most_neighbours_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(4).normal(size=(4000, 8)).astype(np.float32)
    exact = nearest(vectors, 10)
    monkeypatch.setattr(graph_smooth, "EXACT_ITEMS", 1000)
    approximate = nearest(vectors, 10)
    assert np.array_equal(approximate.indices, nearest(vectors, 10).indices)
    shared = unweighted(exact).multiply(unweighted(approximate)).sum()
    assert 0.8 * exact.nnz < shared


def test_ranges_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"vectors\.smooth\.gamma must be >= 0"):
        GraphSmoothConfig(gamma=-1)
    with pytest.raises(ConfigError, match=r"vectors\.smooth\.neighbours must be >= 1"):
        GraphSmoothConfig(neighbours=0)
