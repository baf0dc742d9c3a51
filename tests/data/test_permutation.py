"""A permutation that is computed: one to one at any size, any part alone, another for each key."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data.permutation import permuted


@given(st.integers(1, 3000), st.integers(0, 5))
def test_every_number_once(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key=(key, 1))), np.arange(size))


def test_a_part_is_that_of_the_whole() -> None:
    whole = permuted(np.arange(1000), 1000, key=(3,))
    assert np.array_equal(permuted(np.arange(400, 600), 1000, key=(3,)), whole[400:600])
    assert not np.array_equal(whole, permuted(np.arange(1000), 1000, key=(4,)))
    assert permuted(np.array([10**12 - 1]), 10**12, key=(0,))[0] < 10**12


def test_it_looks_random() -> None:
    whole = permuted(np.arange(10_000), 10_000, key=(0,)).astype(float)
    assert abs(np.corrcoef(whole, np.arange(10_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.03
    # The first tenth is a fair sample: its mean is within four standard errors.
    assert abs(whole[:1000].mean() - 5000) < 4 * 2887 / 1000**0.5
