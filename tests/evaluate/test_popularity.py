"""Popularity lists: the definition, item by item."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data.ragged import Ragged
from forge_ray.evaluate import popularity
from forge_ray.evaluate.popularity import Popularity, fill_popular, popularity_order

ORDER = popularity_order(np.array([3, 9, 0, 3, 5]))


def test_order_breaks_ties_by_index() -> None:
    assert ORDER.tolist() == [1, 4, 0, 3, 2]


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_filling_equals_brute_force(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(12)
    seen = [rng.integers(0, 12, size=rng.integers(0, 9)) for _ in range(6)]
    ranked = np.full((6, k), -1)
    for row in range(6):
        own = [item for item in rng.permutation(12) if item not in seen[row]]
        have = rng.integers(0, min(k, len(own)) + 1)
        ranked[row, :have] = own[:have]
    filled = fill_popular(ranked, Ragged.from_lists(seen, dtype=np.int32), order)
    for row in range(6):
        listed = [int(item) for item in ranked[row] if item >= 0]
        rest = [int(i) for i in order if i not in seen[row] and i not in listed]
        want = (listed + rest)[:k]
        assert filled[row].tolist() == want + [-1] * (k - len(want))


def test_blocks_do_not_change_the_lists(monkeypatch) -> None:
    rng = np.random.default_rng(1)
    seen = Ragged.from_lists([rng.integers(0, 5, size=2) for _ in range(7)])
    whole = Popularity(ORDER).recommend(seen, 3)
    monkeypatch.setattr(popularity, "_BLOCK_CELLS", 1)
    assert np.array_equal(Popularity(ORDER).recommend(seen, 3), whole)
