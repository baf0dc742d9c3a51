"""Behaviour fusion: PPMI, SVD and PCA against dense algebra; alpha 0 changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data.cooccurrence import window_counts
from forge_ray.data.ragged import Ragged
from forge_ray.embed import behaviour
from forge_ray.embed.behaviour import behaviour_vectors, fuse, ppmi


@pytest.fixture
def communities() -> Ragged:
    """Users who stay inside one of two halves of 40 items."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 20, size=10) + 20 * (user % 2) for user in range(200)]
    return Ragged.from_lists(rows, dtype=np.int32)


def test_items_bought_together_come_close(communities: Ragged) -> None:
    vectors = behaviour_vectors(window_counts([communities], 40, window=3), 8)
    similarity = vectors @ vectors.T
    assert similarity[:20, :20].mean() > similarity[:20, 20:].mean() + 0.2
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_fusion_keeps_width_and_repeats(communities: Ragged) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    counts = window_counts([communities], 40, window=3)
    first = fuse(vectors, behaviour_vectors(counts, 8), alpha=0.5)
    second = fuse(vectors, behaviour_vectors(counts, 8), alpha=0.5)
    assert first.shape == vectors.shape
    assert first.tobytes() == second.tobytes()
    assert fuse(vectors, behaviour_vectors(counts, 8), alpha=0) is vectors
    gap = np.linalg.norm(first[:20].mean(0) - first[20:].mean(0))
    assert gap > np.linalg.norm(vectors[:20].mean(0) - vectors[20:].mean(0)) * 0.5


def test_items_without_neighbours_get_zero_rows() -> None:
    counts = window_counts([Ragged.from_lists([[0, 1, 0, 1], []], dtype=np.int32)], 5, window=3)
    vectors = behaviour_vectors(counts, 3)
    assert np.isfinite(vectors).all()
    assert not vectors[2:].any()
    empty = window_counts([Ragged.from_lists([[]], dtype=np.int32)], 5, window=3)
    assert not behaviour_vectors(empty, 3).any()


def dense_ppmi(counts: np.ndarray) -> np.ndarray:
    total, degree = counts.sum(), counts.sum(axis=1)
    out = np.zeros_like(counts)
    for a in range(len(counts)):
        for b in range(len(counts)):
            if counts[a, b] > 0:
                out[a, b] = max(0.0, math.log(counts[a, b] * total / (degree[a] * degree[b])))
    return out


@given(st.lists(st.lists(st.integers(0, 7), max_size=6), max_size=6))
def test_ppmi_equals_a_loop(log: list[list[int]]) -> None:
    counts = window_counts([Ragged.from_lists(log, dtype=np.int32)], 8, window=2)
    matrix = ppmi(counts)
    np.testing.assert_allclose(matrix.toarray(), dense_ppmi(counts.toarray()), atol=1e-12)
    assert (matrix.data > 0).all()


def communities_of(num_items: int, num_groups: int) -> sp.csr_array:
    rng = np.random.default_rng(2)
    size = num_items // num_groups
    group = rng.integers(0, num_groups, size=4 * num_items)
    rows = rng.integers(0, size, size=(len(group), 8)) + size * group[:, None]
    mixed = np.where(rng.random(rows.shape) < 0.2, rng.integers(0, num_items, rows.shape), rows)
    return window_counts([Ragged.from_lists(mixed, dtype=np.int32)], num_items, window=3)


@pytest.mark.parametrize(("num_items", "dim"), [(60, 8), (900, 12), (900, 40)])
def test_svd_equals_dense_algebra(num_items: int, dim: int) -> None:
    """Inside the subspace of the largest singular values, whatever its rotation."""
    counts = communities_of(num_items, 6)
    left, strength, _ = np.linalg.svd(ppmi(counts).toarray())
    expected = (left[:, :dim] * strength[:dim]) @ left[:, :dim].T
    basis, found = behaviour._singular_pairs(ppmi(counts).astype(np.float32), dim)
    np.testing.assert_allclose(found, strength[:dim], atol=1e-4 * strength[0])
    np.testing.assert_allclose(basis.T @ basis, np.eye(dim), atol=1e-4)
    lost = np.linalg.norm((basis * found) @ basis.T - expected) / np.linalg.norm(expected)
    assert lost < 0.03
    apart = behaviour_vectors(counts, dim)
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=0)[None], axis=0)
    scaled = basis * np.sign(largest) * np.sqrt(found)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    np.testing.assert_allclose(apart, scaled, atol=1e-4)


@pytest.mark.parametrize("rows", [7, 1000])
def test_fusion_equals_dense_pca(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "FUSE_ROWS", rows)
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(50, 6)).astype(np.float32)
    extra = rng.normal(size=(50, 4)).astype(np.float32)
    extra /= np.linalg.norm(extra, axis=1, keepdims=True)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    both = np.concatenate([unit, 0.5 * extra], axis=1).astype(np.float64)
    both -= both.mean(axis=0)
    _, _, axes = np.linalg.svd(both, full_matrices=False)
    expected = both @ axes[:6].T
    fused = fuse(vectors, extra, alpha=0.5)
    np.testing.assert_allclose(np.abs(fused), np.abs(expected), atol=1e-5)
