"""`extra_token` and `pop_rank` against numbering written out one item at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.sid.resolvers import ExtraTokenConfig, PopRankConfig, ResolverConfig
from tests.sid.resolvers.plain import Catalogue, numbered, occupancy

CASE = st.builds(Catalogue.draw, st.integers(0, 2**32 - 1), st.integers(1, 60))
KINDS = [(ExtraTokenConfig(), False), (PopRankConfig(), True)]


@settings(max_examples=150)
@given(CASE, st.sampled_from(KINDS))
def test_numbers_equal_the_plain_ones(case: Catalogue, kind: tuple[ResolverConfig, bool]) -> None:
    config, by_count = kind
    result, expected = case.resolve(config), numbered(case, by_count=by_count)
    if not expected.any():
        assert result.codes.shape[1] == 3
        assert result.codebook_sizes == case.sizes
        return
    assert np.array_equal(result.codes[:, 3], expected)
    assert result.codebook_sizes == (*case.sizes, max(occupancy(case.codes).values()))


def test_the_most_popular_item_comes_first_and_newcomers_last() -> None:
    case = Catalogue.draw(0, 12)
    case.codes[:] = 0
    case.counts[:] = np.arange(12)
    published = np.full((12, 4), -1)
    published[:8] = case.take(slice(0, 8)).resolve(PopRankConfig()).codes
    assert published[:8, 3].tolist() == list(range(8))[::-1]
    result = case.resolve(PopRankConfig(), published=published)
    assert result.codes[8:, 3].tolist() == [11, 10, 9, 8]
    assert result.codebook_sizes[-1] == 12


@pytest.mark.parametrize("config", [ExtraTokenConfig(), PopRankConfig()])
def test_the_first_collision_of_a_published_table_appends_the_level(
    config: ResolverConfig,
) -> None:
    case = Catalogue.draw(0, 3)
    case.codes[:] = [[0, 0, 0], [0, 0, 1], [0, 0, 1]]
    published = case.take(slice(0, 2)).resolve(config).codes
    assert published.shape == (2, 3)
    padded = np.concatenate([published, [[-1, -1, -1]]])
    assert case.resolve(config, published=padded).codes[:, 3].tolist() == [0, 0, 1]
    case.codes[2] = [0, 0, 2]
    assert case.resolve(config, published=padded).codes.shape == (3, 3)
