"""Projective residuals: orthogonal to the chosen centroid, soft updates as defined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import Quantizer, TrainingSet
from forge_ray.sid.quantizers.prq_kmeans import (
    PrqKmeans,
    PrqKmeansConfig,
    project_out,
    soft_update,
    unit,
)
from tests.contracts.quantizer_contract import ResidualContract, clustered_vectors


class TestPrqKmeans(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> PrqKmeansConfig:
        return PrqKmeansConfig(levels=3, sizes=[16, 8, 4], iterations=10)

    def test_codes_follow_the_definition_and_residuals_are_orthogonal(
        self, fitted: PrqKmeans, vectors: np.ndarray
    ) -> None:
        codes = fitted.encode(vectors)
        common = fitted.common.numpy().astype(np.float64)
        left = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float64)
        left = left - np.outer(left @ common, common)
        left /= np.linalg.norm(left, axis=1, keepdims=True)
        for level in range(3):
            centroids = fitted.directions[level].numpy().astype(np.float64)
            assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
            chosen = centroids[codes[:, level]]
            best = (left @ centroids.T).max(axis=1)
            assert np.allclose((left * chosen).sum(axis=1), best, atol=1e-5)
            left = left - (left * chosen).sum(axis=1, keepdims=True) * chosen
            left /= np.linalg.norm(left, axis=1, keepdims=True)
            # Unit length to seven digits, and a rest that may be a hundredth of the vector.
            assert np.abs((left * chosen).sum(axis=1)).max() < 1e-4

    def test_length_does_not_matter(self, fitted: PrqKmeans, vectors: np.ndarray) -> None:
        assert np.array_equal(fitted.encode(4 * vectors), fitted.encode(vectors))

    def test_decoding_explains_vectors(self, fitted: PrqKmeans, vectors: np.ndarray) -> None:
        error = np.square(fitted.decode(fitted.encode(vectors)) - vectors).sum()
        assert error < 0.5 * np.square(vectors - vectors.mean(0)).sum()

    @pytest.mark.parametrize(
        "change",
        [{"iterations": 1}, {"sharpness": 2.0}, {"max_points_per_code": 10}],
        ids=str,
    )
    def test_every_field_changes_the_result(
        self,
        change: dict[str, Any],
        config: PrqKmeansConfig,
        fitted: Quantizer,
        vectors: np.ndarray,
    ) -> None:
        changed = self.fit(replace(config, **change), vectors).state_dict()
        assert not np.array_equal(changed["codebook.0"], fitted.state_dict()["codebook.0"])

    def test_numbers_are_checked(self) -> None:
        with pytest.raises(ConfigError, match="sharpness must be > 0"):
            PrqKmeansConfig(sharpness=0)
        with pytest.raises(ConfigError, match="iterations must be >= 1"):
            PrqKmeansConfig(iterations=0)


def test_soft_updates_equal_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    points = unit(torch.randn(700, 6, generator=generator))
    centroids = points[:9].clone()
    sums = np.zeros((9, 6))
    for point in points.double().numpy():
        cosines = centroids.double().numpy() @ point
        for code in np.argsort(-cosines)[:2]:
            sums[code] += np.exp(15 * cosines[code]) * point
    expected = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    assert np.allclose(soft_update(points, centroids, sharpness=15.0).numpy(), expected, atol=1e-5)


def test_a_centroid_without_points_stays_and_nothing_left_stays_zero() -> None:
    points = unit(torch.tensor([[1.0, 0.1, 0.0], [1.0, -0.1, 0.0]]))
    centroids = unit(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, -1.0]]))
    assert torch.equal(soft_update(points, centroids, sharpness=15.0)[2], centroids[2])
    assert torch.equal(project_out(points, points), torch.zeros_like(points))


def test_duplicates_and_zeros_do_not_break_fitting() -> None:
    vectors = np.concatenate([np.zeros((5, 16)), np.repeat(clustered_vectors(10), 10, axis=0)])
    quantizer = PrqKmeansConfig(levels=3, codebook_size=32).build(16, seed=0)
    quantizer.fit(TrainingSet(vectors.astype(np.float32)))
    assert np.isfinite(quantizer.decode(quantizer.encode(vectors))).all()
