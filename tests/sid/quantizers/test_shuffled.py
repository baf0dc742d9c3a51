"""The paired control: the inner quantizer's symbols to the last digit, on the wrong items."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.config import from_mapping, load_config, to_mapping, to_overrides
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.quality import symbol_quality
from forge_ray.sid.quantizers.base import Quantizer
from forge_ray.sid.quantizers.fsq import FsqConfig
from forge_ray.sid.quantizers.random_codes import RandomConfig
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.quantizers.shuffled import ShuffledConfig
from tests.contracts.quantizer_contract import QuantizerContract, ResidualContract


class TestShuffledKmeans(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> ShuffledConfig:
        return ShuffledConfig(of=RqKmeansConfig(levels=3, sizes=[16, 8, 4], iterations=10))

    def test_it_is_the_inner_quantizer_but_for_the_order(
        self, config: ShuffledConfig, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        inner = self.fit(config.of, vectors)
        assert inner.item_order(400) is None
        order = fitted.item_order(400)
        assert order is not None
        assert np.array_equal(np.sort(order), np.arange(400))
        assert np.array_equal(order, fitted.item_order(400))
        codes = inner.encode(vectors)
        assert np.array_equal(fitted.encode(vectors), codes)
        plain = symbol_quality(codes, inner.codebook_sizes)
        assert symbol_quality(codes[order], inner.codebook_sizes) == plain
        related = (codes[order][20:, 0] == codes[order][:-20, 0]).mean()
        assert related < (codes[20:, 0] == codes[:-20, 0]).mean() - 0.2


class TestShuffledRandom(QuantizerContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> ShuffledConfig:
        return ShuffledConfig(of=RandomConfig(), sizes=[16, 8, 4])


def test_the_seed_of_the_permutation_is_its_own() -> None:
    one, other = (ShuffledConfig(shuffle_seed=seed).build(8, seed=0) for seed in (0, 1))
    assert not np.array_equal(one.item_order(50), other.item_order(50))
    again = ShuffledConfig(shuffle_seed=1).build(8, seed=3)
    assert np.array_equal(again.item_order(50), other.item_order(50))


@pytest.mark.parametrize("place", ["", "of."])
def test_common_fields_are_set_in_either_place(place: str) -> None:
    config = load_config(
        ShuffledConfig,
        overrides=[
            "of.kind=fsq",
            "of.variant=residual",
            f"{place}levels=2",
            f"{place}sizes=[9,16]",
        ],
    )
    assert config.of == FsqConfig(variant="residual", levels=2, sizes=[9, 16])
    assert (config.levels, config.sizes) == (2, [9, 16])
    assert config.codebook_sizes == (9, 16)
    assert from_mapping(ShuffledConfig, to_mapping(config)) == config
    assert load_config(ShuffledConfig, overrides=to_overrides(config)) == config


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"levels must equal quantizer\.of\.levels, got 2 and 4"):
        load_config(ShuffledConfig, overrides=["levels=2", "of.levels=4"])
    with pytest.raises(ConfigError, match="must not be 'shuffled'"):
        load_config(ShuffledConfig, overrides=["of.kind=shuffled"])
    with pytest.raises(ConfigError, match="shuffle_seed must be >= 0"):
        ShuffledConfig(shuffle_seed=-1)
