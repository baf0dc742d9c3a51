"""`knn_cap` and `random_cap` against the policy written out one item at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.hashing import distinct_hashes, hashed_orders
from forge_ray.sid.resolvers import KnnCapConfig, RandomCapConfig, capacity, groups, resolve
from tests.sid.resolvers.plain import Catalogue, capped

CASE = st.builds(Catalogue.draw, st.integers(0, 2**32 - 1), st.integers(1, 60))
POLICY = st.fixed_dictionaries(
    {
        "cap": st.integers(1, 4),
        "candidates": st.integers(1, 7),
        "order": st.sampled_from(["row", "priority"]),
    }
)


@settings(max_examples=300)
@given(CASE, POLICY)
def test_knn_cap_equals_the_plain_policy(case: Catalogue, policy: dict) -> None:
    result = case.resolve(KnnCapConfig(**policy))
    limit = policy["candidates"]
    expected = capped(
        case, case.wishes.tolist(), cap=policy["cap"], limit=limit, order=policy["order"]
    )
    assert np.array_equal(result.codes, expected)
    ranks = [
        list(others).index(new) + 1
        for own, new, others in zip(
            case.codes[:, -1], expected[:, -1], case.wishes.tolist(), strict=True
        )
        if own != new
        for others in [[code for code in others if code != own]]
    ]
    assert result.report["mean_candidate_rank"] == pytest.approx(np.mean(ranks) if ranks else 0)
    assert result.report["moved"] == len(ranks)


@settings(max_examples=200)
@given(CASE, POLICY, st.integers(0, 5))
def test_random_cap_equals_the_plain_policy(case: Catalogue, policy: dict, seed: int) -> None:
    wishes = hashed_orders(distinct_hashes(case.ids), 6, 6, seed=seed).tolist()
    result = case.resolve(RandomCapConfig(**policy, seed=seed))
    expected = capped(
        case, wishes, cap=policy["cap"], limit=policy["candidates"], order=policy["order"]
    )
    assert np.array_equal(result.codes, expected)


@given(CASE, POLICY)
def test_small_blocks_give_the_same_table(case: Catalogue, policy: dict) -> None:
    whole = case.resolve(KnnCapConfig(**policy)).codes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity, "_PART_ROWS", 7)
        patch.setattr(groups, "_ROWS_AT_ONCE", 2)
        patch.setattr(capacity, "_BLOCK_ROWS", 3)
        patch.setattr(capacity, "_BLOCK_PLACES", 12)
        patch.setattr(capacity, "_LOOKAHEAD", 2)
        assert np.array_equal(case.resolve(KnnCapConfig(**policy)).codes, whole)


def test_a_short_list_ends_where_it_says() -> None:
    codes = np.zeros((4, 2), dtype=np.int64)
    lists = np.array([[0, 3, -1]] * 4)
    for order in ("row", "priority"):
        result = resolve(
            KnnCapConfig(cap=1, order=order),
            codes,
            (1, 5),
            item_ids=np.arange(4),
            candidates=lambda rows, limit: lists[rows, :limit],
        )
        assert sorted(result.codes[:, 1].tolist()) == [0, 0, 0, 3]
        assert result.report["unplaced"] == 2


def test_order_and_seed_change_the_result() -> None:
    case = Catalogue.draw(5, 60)
    case.codes[:] = case.codes[0]
    by_order = [case.resolve(KnnCapConfig(cap=2, order=order)) for order in ("row", "priority")]
    assert not np.array_equal(by_order[0].codes, by_order[1].codes)
    by_seed = [case.resolve(RandomCapConfig(cap=2, seed=seed)) for seed in (0, 1)]
    assert not np.array_equal(by_seed[0].codes, by_seed[1].codes)


def test_a_collapsed_prefix_fills_up_and_the_rest_is_counted() -> None:
    rng = np.random.default_rng(0)
    wishes = np.argsort(rng.random((5000, 256)), axis=1)
    result = resolve(
        KnnCapConfig(cap=5, candidates=256),
        np.zeros((5000, 3), dtype=np.uint16),
        (256, 256, 256),
        item_ids=np.arange(5000),
        candidates=lambda rows, limit: wishes[rows, :limit],
    )
    assert result.report["unplaced"] == 5000 - 5 * 256
    assert result.report["max_bucket_before"] == 5000
