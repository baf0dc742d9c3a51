"""What every resolver promises: capacity, completeness, levels it may touch, and no surprises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.config import from_mapping
from forge_ray.errors import ConfigError
from forge_ray.sid.resolvers import (
    KINDS,
    BucketConfig,
    ExtraTokenConfig,
    KnnCapConfig,
    PopRankConfig,
    RandomCapConfig,
    ResolverConfig,
    SinkhornLastConfig,
    ZcrConfig,
    resolve,
)
from forge_ray.sid.resolvers.base import Resolution
from tests.sid.resolvers.plain import Catalogue, occupancy

SIZES = st.sampled_from([(3, 2, 6), (4, 3), (2, 2, 2, 3)])
CAPPED = st.builds(
    dict,
    cap=st.integers(1, 4),
    candidates=st.integers(1, 7),
    order=st.sampled_from(["row", "priority"]),
)
CONFIG = st.one_of(
    st.sampled_from([BucketConfig(), ExtraTokenConfig(), PopRankConfig(), ZcrConfig()]),
    st.builds(lambda e: SinkhornLastConfig(epsilon=e, iterations=5), st.sampled_from([0.003, 0.3])),
    CAPPED.map(lambda given: KnnCapConfig(**given)),
    st.builds(lambda given, s: RandomCapConfig(**given, seed=s), CAPPED, st.integers(0, 3)),
)
CASE = st.builds(Catalogue.draw, st.integers(0, 2**32 - 1), st.integers(1, 60), SIZES)


def check_capacity(result: Resolution, config: ResolverConfig) -> None:
    """Without the items it counts as unplaced, no SID holds more than the capacity."""
    assert result.report["unplaced"] == result.over_capacity.sum()
    if config.capacity is None:
        assert not result.over_capacity.any()
        return
    placed = occupancy(result.codes[~result.over_capacity])
    assert max(placed.values(), default=0) <= config.capacity
    full = occupancy(result.codes)
    for sid in map(tuple, result.codes[result.over_capacity].tolist()):
        assert full[sid] > config.capacity


@settings(max_examples=300)
@given(CASE, CONFIG)
def test_capacity_completeness_and_untouched_levels(
    case: Catalogue, config: ResolverConfig
) -> None:
    result = case.resolve(config)
    depth = len(case.sizes)
    untouched = [level for level in range(depth) if level != config.level_written(depth)]
    assert len(untouched) >= depth - 1
    assert np.array_equal(result.codes[:, untouched], case.codes[:, untouched])
    assert len(result.codes) == result.report["items"] == len(case)
    assert (result.codes >= 0).all()
    assert (result.codes < np.array(result.codebook_sizes)).all()
    check_capacity(result, config)
    stayed = result.over_capacity
    assert np.array_equal(result.codes[stayed][:, :depth], case.codes[stayed])
    if config.level_written(depth) == depth:
        assert max(occupancy(result.codes).values()) == 1
    else:
        assert result.codes.shape == case.codes.shape


@settings(max_examples=200)
@given(CASE, CONFIG)
def test_a_second_run_changes_nothing(case: Catalogue, config: ResolverConfig) -> None:
    first = case.resolve(config)
    if first.codes.shape[1] > len(case.sizes):
        again = resolve(
            config,
            first.codes,
            first.codebook_sizes,
            item_ids=case.ids,
            train_counts=case.counts,
        )
    else:
        resolved = Catalogue(first.codes, case.sizes, case.ids, case.counts, case.distances)
        again = resolved.resolve(config)
    assert np.array_equal(again.codes, first.codes)
    assert again.codebook_sizes == first.codebook_sizes
    assert np.array_equal(again.over_capacity, first.over_capacity)


@settings(max_examples=200)
@given(CASE, CONFIG)
def test_row_order_does_not_matter(case: Catalogue, config: ResolverConfig) -> None:
    order = np.random.default_rng(len(case)).permutation(len(case))
    result, permuted = case.resolve(config), case.take(order).resolve(config)
    assert np.array_equal(permuted.codes, result.codes[order])
    assert np.array_equal(permuted.over_capacity, result.over_capacity[order])


@settings(max_examples=300)
@given(CASE, CONFIG, st.randoms(use_true_random=False))
def test_new_items_rename_nobody(case: Catalogue, config: ResolverConfig, random: object) -> None:
    """Twice in a row: a table published, extended, published and extended again."""
    first, second = len(case) // 3, 2 * len(case) // 3
    published = case.take(slice(0, first)).resolve(config).codes
    for known, total in ((first, second), (second, len(case))):
        padded = np.full((total, published.shape[1]), -1)
        padded[:known] = published
        result = case.take(slice(0, total)).resolve(config, published=padded)
        width = published.shape[1]
        assert np.array_equal(result.codes[:known, :width], published)
        assert not result.codes[:known, width:].any()
        assert np.array_equal(result.codes[:, : len(case.sizes) - 1], case.codes[:total, :-1])
        check_capacity(result, config)
        if config.kind in ("extra_token", "pop_rank"):
            assert max(occupancy(result.codes).values(), default=1) == 1
        published = result.codes


def test_every_kind_is_a_choice() -> None:
    assert set(ResolverConfig.choices().values()) == set(KINDS)
    assert ResolverConfig.choices() == {kind().kind: kind for kind in KINDS}


@pytest.mark.parametrize("config", [KnnCapConfig(), ZcrConfig(), SinkhornLastConfig()])
def test_policies_by_distance_say_that_they_need_a_quantizer(config: ResolverConfig) -> None:
    with pytest.raises(ConfigError, match=r"without a quantizer.*random_cap"):
        resolve(config, np.zeros((9, 3), int), (3, 2, 6), item_ids=np.arange(9))


def test_popularity_needs_counts() -> None:
    with pytest.raises(ConfigError, match="train counts"):
        resolve(PopRankConfig(), np.zeros((9, 3), int), (3, 2, 6), item_ids=np.arange(9))


@pytest.mark.parametrize(
    ("schema", "values", "field"),
    [
        (KnnCapConfig, {"cap": 0}, "cap must be >= 1"),
        (RandomCapConfig, {"candidates": 0}, "candidates must be >= 1"),
        (RandomCapConfig, {"seed": -1}, "seed must be >= 0"),
        (SinkhornLastConfig, {"epsilon": 0.0}, "epsilon must be > 0"),
        (SinkhornLastConfig, {"iterations": 0}, "iterations must be >= 1"),
    ],
)
def test_bad_settings_name_their_field(schema: type, values: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        from_mapping(schema, values)
