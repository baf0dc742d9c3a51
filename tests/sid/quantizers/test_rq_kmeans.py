"""Residual k-means keeps the quantizer contract; its codeword sum is its reconstruction."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import Quantizer, TrainingSet
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from tests.contracts.quantizer_contract import ResidualContract, clustered_vectors


class TestRqKmeans(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> RqKmeansConfig:
        return RqKmeansConfig(levels=3, sizes=[16, 8, 4], iterations=10)

    def test_sum_is_the_reconstruction(self, fitted: Quantizer, vectors: np.ndarray) -> None:
        codes = fitted.encode(vectors)
        assert np.array_equal(fitted.codeword_sum(codes), fitted.decode(codes))

    def test_decoding_keeps_most_of_the_signal(
        self, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        error = np.square(fitted.decode(fitted.encode(vectors)) - vectors).sum()
        assert error < 0.5 * np.square(vectors - vectors.mean(0)).sum()

    def test_residual_shrinks_with_every_level_and_level_one_is_used(
        self, config: RqKmeansConfig, vectors: np.ndarray
    ) -> None:
        curve: list[float] = []
        quantizer = config.build(16, seed=0)
        quantizer.fit(
            TrainingSet(vectors), report=lambda step, metrics: curve.append(metrics["residual"])
        )
        assert curve == sorted(curve, reverse=True)
        assert len(curve) == 3
        assert len(np.unique(quantizer.encode(vectors)[:, 0])) == 16

    def test_iterations_change_the_result(self, vectors: np.ndarray) -> None:
        states = [
            self.fit(RqKmeansConfig(codebook_size=16, iterations=n), vectors).state_dict()
            for n in (1, 10)
        ]
        assert not np.array_equal(states[0]["codebook.0"], states[1]["codebook.0"])


def test_duplicate_vectors_do_not_break_fitting() -> None:
    vectors = np.repeat(clustered_vectors(10), 10, axis=0)
    quantizer = RqKmeansConfig(levels=2, codebook_size=32).build(16, seed=0)
    quantizer.fit(TrainingSet(vectors))
    codes = quantizer.encode(vectors)
    assert np.isfinite(quantizer.decode(codes)).all()
    assert len(np.unique(codes, axis=0)) == 10


def test_sizes_and_levels_must_agree() -> None:
    with pytest.raises(ConfigError, match="must name 3 sizes"):
        load_config(RqKmeansConfig, overrides=["sizes=[4,4]"])
    with pytest.raises(ConfigError, match="levels must be >= 1"):
        load_config(RqKmeansConfig, overrides=["levels=0"])
    with pytest.raises(ConfigError, match="sizes must be >= 2"):
        load_config(RqKmeansConfig, overrides=["codebook_size=1"])
    assert RqKmeansConfig(levels=2, sizes=[4, 8]).codebook_sizes == (4, 8)
    assert RqKmeansConfig(levels=2, codebook_size=8).codebook_sizes == (8, 8)
