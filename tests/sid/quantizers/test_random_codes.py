"""The random control: balanced, reproducible, and blind to what the vectors mean."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.sid.quantizers.base import TrainingSet
from forge_ray.sid.quantizers.random_codes import RandomConfig
from tests.contracts.quantizer_contract import QuantizerContract, clustered_vectors


class TestRandomCodes(QuantizerContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> RandomConfig:
        return RandomConfig(levels=3, sizes=[16, 8, 4])


def test_codes_are_balanced_and_independent_of_meaning() -> None:
    vectors = clustered_vectors(8000)
    quantizer = RandomConfig(levels=2, codebook_size=16).build(16, seed=0)
    quantizer.fit(TrainingSet(vectors))
    codes = quantizer.encode(vectors)
    for level in range(2):
        counts = np.bincount(codes[:, level], minlength=16)
        assert counts.min() > 400
        assert counts.max() < 600
    joint = np.bincount(codes[:, 0] * 16 + codes[:, 1], minlength=256)
    assert joint.max() < 70
    related = (codes[20:, 0] == codes[:-20, 0]).mean()
    assert abs(related - 1 / 16) < 0.02
