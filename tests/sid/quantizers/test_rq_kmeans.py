"""Residual k-means keeps the quantizer contract; its codeword sum is its reconstruction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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

    @pytest.mark.parametrize(
        "change",
        [
            {"iterations": 1},
            {"init": "k-means++"},
            {"init": "progressive"},
            {"max_points_per_code": 10},
            {"balanced_last": True},
        ],
        ids=str,
    )
    def test_every_field_changes_the_result(
        self, change: dict[str, Any], vectors: np.ndarray
    ) -> None:
        base = RqKmeansConfig(codebook_size=16)
        states = [self.fit(one, vectors).state_dict() for one in (base, replace(base, **change))]
        assert not np.array_equal(states[0]["codebook.2"], states[1]["codebook.2"])

    def test_the_manifest_gets_the_sample(self, vectors: np.ndarray) -> None:
        quantizer = self.fit(RqKmeansConfig(sizes=[16, 32, 64], max_points_per_code=10), vectors)
        assert quantizer.facts() == {
            "fit_vectors": 400,
            "clustered_vectors": [160, 320, 400],
        }


class TestBalancedRqKmeans(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> RqKmeansConfig:
        return RqKmeansConfig(levels=3, sizes=[16, 8, 8], iterations=10, balanced_last=True)

    def test_only_the_last_level_differs_and_is_even(
        self, config: RqKmeansConfig, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        plain = self.fit(replace(config, balanced_last=False), vectors)
        for level in (0, 1):
            name = f"codebook.{level}"
            assert np.array_equal(fitted.state_dict()[name], plain.state_dict()[name])
        codes, before = fitted.encode(vectors), plain.encode(vectors)
        assert np.array_equal(codes[:, :2], before[:, :2])
        counts = np.bincount(codes[:, 2], minlength=8)
        assert np.abs(counts - 50).max() <= 10
        assert entropy(codes[:, 2], 8) > entropy(before[:, 2], 8)

    def test_unseen_vectors_are_even_too_at_little_cost(self) -> None:
        config = RqKmeansConfig(codebook_size=16, balanced_last=True)
        vectors = clustered_vectors(4000)
        seen, unseen = vectors[:2000], vectors[2000:]
        balanced = self.fit(config, seen)
        plain = self.fit(replace(config, balanced_last=False), seen)
        codes, before = balanced.encode(unseen), plain.encode(unseen)
        assert entropy(codes[:, 2], 16) > max(0.995, entropy(before[:, 2], 16))
        error, plain_error = (
            np.square(one.decode(some) - unseen).sum()
            for one, some in ((balanced, codes), (plain, before))
        )
        assert error < 1.05 * plain_error


def entropy(codes: np.ndarray, size: int) -> float:
    share = np.bincount(codes, minlength=size) / len(codes)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum() / np.log(size))


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
