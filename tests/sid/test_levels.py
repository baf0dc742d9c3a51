"""Figures by prefix depth against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.sid.levels import group_cosine, nearest_rows, prefix_figures
from forge_ray.sid.quantizers.base import TrainingSet
from forge_ray.sid.quantizers.random_codes import RandomConfig
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from tests.contracts.quantizer_contract import clustered_vectors


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_every_depth_against_a_loop_over_pairs() -> None:
    vectors = clustered_vectors(60)
    quantizer = RqKmeansConfig(levels=2, codebook_size=8).build(16, seed=0)
    quantizer.fit(TrainingSet(vectors))
    codes = quantizer.encode(vectors)
    rows = prefix_figures(vectors, codes, quantizer)
    assert [row.depth for row in rows] == [0, 1, 2]
    mean = vectors.mean(axis=0)
    for row in rows:
        shared = [
            cosine(vectors[i], vectors[j])
            for i in range(60)
            for j in range(60)
            if i != j and (codes[i, : row.depth] == codes[j, : row.depth]).all()
        ]
        assert row.cohesion == pytest.approx(np.mean(shared), abs=1e-5)
        if row.depth:
            decoded = quantizer.decode(codes[:, : row.depth])
            near = [cosine(x - mean, y - mean) for x, y in zip(vectors, decoded, strict=True)]
            assert row.cosine == pytest.approx(np.mean(near), abs=1e-5)
            lost = sum(np.square(x - y).sum() for x, y in zip(vectors, decoded, strict=True))
            spread = sum(np.square(x - mean).sum() for x in vectors)
            assert row.r2 == pytest.approx(1 - lost / spread, abs=1e-5)
    assert rows[0].r2 == rows[0].cosine == 0
    assert rows[0].r2 < rows[1].r2 < rows[2].r2
    assert rows[0].cohesion < rows[1].cohesion < rows[2].cohesion


def test_a_resolvers_level_is_left_out_and_controls_show_nothing() -> None:
    vectors = clustered_vectors(4000)
    quantizer = RandomConfig(levels=2, codebook_size=8).build(16, seed=0)
    quantizer.fit(TrainingSet(vectors))
    codes = np.column_stack([quantizer.encode(vectors), np.arange(4000)])
    rows = prefix_figures(vectors, codes, quantizer)
    assert len(rows) == 3
    assert all(abs(row.cohesion - rows[0].cohesion) < 0.02 for row in rows)
    assert rows[2].r2 < 0.02


def test_cosine_by_group() -> None:
    vectors = np.array([[1, 0], [0, 2], [3, 3], [1, 1], [5, 5]], dtype=np.float32)
    found = group_cosine(vectors, np.array([0, 0, 2, 3, 3]))
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert np.isnan(found[1])
    assert np.isnan(found[2])
    assert found[3] == pytest.approx(1)


def test_nearest_by_direction() -> None:
    vectors = np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    targets = np.array([[0.1, 9], [-3, 1]], dtype=np.float32)
    assert nearest_rows(targets, vectors).tolist() == [1, 2]
