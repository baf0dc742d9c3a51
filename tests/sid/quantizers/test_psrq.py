"""PSRQ is residual k-means at one level, and lets deeper levels see the prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import Quantizer, TrainingSet
from forge_ray.sid.quantizers.psrq import Psrq, PsrqConfig
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from tests.contracts.quantizer_contract import ResidualContract, clustered_vectors


class TestPsrq(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> PsrqConfig:
        return PsrqConfig(levels=3, sizes=[16, 8, 4], iterations=10)

    def test_codes_follow_the_definition(self, fitted: Psrq, vectors: np.ndarray) -> None:
        codes = fitted.encode(vectors)
        points = vectors.astype(np.float64)
        residual = points
        for level in range(3):
            words = fitted.codebooks[level].numpy().astype(np.float64)
            seen, wide = residual, words
            if level:
                prefix = fitted.config.prefix_weight * (points - residual)
                seen = np.concatenate([residual, prefix], axis=1)
                context = fitted.contexts[level - 1].numpy()
                wide = np.concatenate([words, context], axis=1)
            distances = ((seen[:, None] - wide[None]) ** 2).sum(axis=2)
            assert np.array_equal(distances.argmin(axis=1), codes[:, level])
            residual = residual - words[codes[:, level]]

    @pytest.mark.parametrize(
        "change",
        [
            {"iterations": 1},
            {"init": "progressive"},
            {"max_points_per_code": 10},
            {"prefix_weight": 1.0},
        ],
        ids=str,
    )
    def test_every_field_changes_the_result(
        self, change: dict[str, Any], config: PsrqConfig, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        changed = self.fit(replace(config, **change), vectors).state_dict()
        assert not np.array_equal(changed["codebook.2"], fitted.state_dict()["codebook.2"])


def test_one_level_is_residual_kmeans() -> None:
    vectors = clustered_vectors()
    states = []
    for config in (PsrqConfig, RqKmeansConfig):
        quantizer = config(levels=1, codebook_size=16, iterations=10).build(16, seed=3)
        quantizer.fit(TrainingSet(vectors))
        states.append(quantizer.state_dict())
    assert states[0].keys() == states[1].keys()
    assert np.array_equal(states[0]["codebook.0"], states[1]["codebook.0"])


def test_without_the_prefix_it_is_residual_kmeans() -> None:
    vectors = clustered_vectors()
    codes = []
    for config in (PsrqConfig(codebook_size=8, prefix_weight=0.0), RqKmeansConfig(codebook_size=8)):
        quantizer = config.build(16, seed=0)
        quantizer.fit(TrainingSet(vectors))
        codes.append(quantizer.encode(vectors))
    assert np.array_equal(codes[0], codes[1])
    with pytest.raises(ConfigError, match="prefix_weight must be >= 0"):
        PsrqConfig(prefix_weight=-1)


def test_items_of_one_deeper_code_are_more_alike_than_in_residual_kmeans() -> None:
    vectors = clustered_vectors(2000)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = []
    for config in (
        RqKmeansConfig(codebook_size=16),
        PsrqConfig(codebook_size=16, prefix_weight=1.0),
    ):
        quantizer = config.build(16, seed=0)
        quantizer.fit(TrainingSet(vectors))
        code = quantizer.encode(vectors)[:, 2]
        same = (code[:, None] == code[None]) & ~np.eye(len(code), dtype=bool)
        cosines.append(float((unit @ unit.T)[same].mean()))
    assert cosines[1] > cosines[0] + 0.1
