"""Bucket-aware ranking metrics: equal to the plain ones without collisions, never flattering."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data.ragged import Ragged
from forge_ray.errors import DataError
from forge_ray.evaluate import ranking
from forge_ray.evaluate.ranking import (
    MetricTotals,
    bucket_metrics,
    bucket_places,
    list_places,
    ranked_metrics,
    target_slices,
)

KS = (1, 3, 5)
SIZES = st.lists(st.integers(0, 4), min_size=6, max_size=6)


def one_user(sizes: list[int], target_beam: int, ks: tuple[int, ...] = KS) -> dict[str, float]:
    found = bucket_metrics(np.array([sizes]), np.array([target_beam]), np.array([0]), ks)
    return {name: float(values[0]) for name, values in found.items()}


def brute_force(ranked: list[int], targets: set[int], k: int) -> tuple[float, float]:
    gains = [1 / np.log2(place + 2) for place, item in enumerate(ranked[:k]) if item in targets]
    ideal = sum(1 / np.log2(place + 2) for place in range(min(len(targets), k)))
    return len(gains) / len(targets), sum(gains) / ideal


@given(st.integers(0, 2**32 - 1))
def test_plain_lists_equal_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(9)[:6] for _ in range(4)])
    ranked[0, 4:] = -1
    rows = [rng.choice(9, size=rng.integers(1, 4), replace=False) for _ in range(4)]
    found = ranked_metrics(ranked, Ragged.from_lists(rows), KS)
    for user, k in itertools.product(range(4), KS):
        hit, ndcg = brute_force(ranked[user].tolist(), set(rows[user].tolist()), k)
        assert found[f"ItemHit@{k}"][user] == pytest.approx(hit)
        assert found[f"ItemNDCG@{k}"][user] == pytest.approx(ndcg)


@given(st.integers(0, 2**32 - 1))
def test_without_collisions_buckets_equal_plain_lists(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(8)[:6] for _ in range(5)])
    targets = Ragged.from_lists(
        [rng.choice(8, size=rng.integers(1, 4), replace=False) for _ in range(5)]
    )
    at = ranked[targets.row_ids] == targets.values[:, None]
    beam = np.where(at.any(axis=1), at.argmax(axis=1), -1)
    plain = ranked_metrics(ranked, targets, KS)
    found = bucket_metrics(np.ones((5, 6), int), beam, targets.row_ids, KS)
    for name, values in plain.items():
        assert found[name] == pytest.approx(values)
        assert found[name.replace("ItemHit", "SidHit")] == pytest.approx(found[name])


@given(SIZES, st.integers(-1, 5), st.data())
def test_expectation_over_orders_inside_the_bucket(
    sizes: list[int], beam: int, data: st.DataObject
) -> None:
    found = one_user(sizes, beam)
    size = sizes[beam] if beam >= 0 else 0
    for k in KS:
        hits, gains = [0.0], [0.0]
        for place in range(size):  # the target is equally likely at every place of its bucket
            ranked = [-1] * (sum(sizes[:beam]) + place) + [7]
            hit, gain = brute_force(ranked, {7}, k)
            hits.append(hit)
            gains.append(gain)
        assert found[f"ItemHit@{k}"] == pytest.approx(sum(hits) / max(size, 1))
        assert found[f"ItemNDCG@{k}"] == pytest.approx(sum(gains) / max(size, 1))


@given(SIZES, st.integers(0, 5))
def test_item_hits_never_exceed_sid_hits_nor_the_list(sizes: list[int], beam: int) -> None:
    found = one_user(sizes, beam)
    for k in KS:
        assert found[f"ItemHit@{k}"] <= found[f"SidHit@{k}"] + 1e-12
        before, size = sum(sizes[:beam]), sizes[beam]
        shown = min(size, max(0, k - before))
        # Summed over the items of one bucket: exactly those that fit into the list.
        assert found[f"ItemHit@{k}"] * size == pytest.approx(shown)
        total = sum(one_user(sizes, other)[f"ItemHit@{k}"] * sizes[other] for other in range(6))
        assert total == pytest.approx(min(sum(sizes), k))


@given(SIZES, st.integers(0, 4))
def test_merging_adjacent_sids_keeps_their_summed_hits(sizes: list[int], left: int) -> None:
    merged = [*sizes[:left], sizes[left] + sizes[left + 1], *sizes[left + 2 :], 0]
    for k in KS:
        apart = sum(
            one_user(sizes, beam)[f"ItemHit@{k}"] * sizes[beam] for beam in (left, left + 1)
        )
        together = one_user(merged, left)[f"ItemHit@{k}"] * merged[left]
        assert together == pytest.approx(apart)


def test_users_with_several_targets_are_macro_averaged() -> None:
    ranked = np.array([[3, 1, 2], [5, 6, 7]])
    targets = Ragged.from_lists([[1, 9], [5]])
    found = ranked_metrics(ranked, targets, [3])
    assert found["ItemHit@3"].tolist() == [0.5, 1.0]
    totals = MetricTotals()
    totals.add(found)
    assert totals.summary()["ItemHit@3"] == 0.75


def test_a_user_without_target_or_a_short_list_is_refused() -> None:
    lists = np.zeros((2, 3), int)
    with pytest.raises(DataError, match="must have a target, got 1"):
        ranked_metrics(lists, Ragged.from_lists([[1], []]), [3])
    with pytest.raises(DataError, match="cut-off 5, got 3"):
        ranked_metrics(lists, Ragged.from_lists([[1], [2]]), [5])
    with pytest.raises(DataError, match="must have a target"):
        bucket_metrics(lists, np.array([0]), np.array([0]), [3])


def test_totals_merge_to_the_summary_of_all_users() -> None:
    rng = np.random.default_rng(0)
    values = {"ItemHit@5": rng.random(40)}
    some = {"ItemHit@5": values["ItemHit@5"][::3]}
    left, right, total = MetricTotals(), MetricTotals(), MetricTotals()
    left.add({"ItemHit@5": values["ItemHit@5"][:15]})
    right.add({"ItemHit@5": values["ItemHit@5"][15:]})
    right.add(some, "tail")
    left.merge(right)
    total.add(values)
    total.add(some, "tail")
    whole = total.summary()
    assert left.summary() == pytest.approx(whole)
    assert whole["ItemHit@5_se"] == pytest.approx(values["ItemHit@5"].std(ddof=1) / np.sqrt(40))
    assert whole["ItemHit@5/tail"] == pytest.approx(some["ItemHit@5"].mean())
    assert (whole["users"], whole["users/tail"]) == (40, 14)


def test_slices_by_train_count() -> None:
    slices = target_slices(Ragged.from_lists([[0], [1], [2, 1]]), np.array([5, 6, 0]))
    assert slices["tail"].tolist() == [True, False, True, False]
    assert slices["head"].tolist() == [False, True, False, True]
    assert slices["cold"].tolist() == [False, False, True, False]


def test_a_slice_scores_its_own_targets_only() -> None:
    lists = np.array([[3, 1, 2], [5, 6, 7], [4, 8, 9]])
    targets = Ragged.from_lists([[1, 9], [5], [0, 9]])
    places = list_places(lists, targets, [3]).take(targets.values == 9)
    # User 0 misses its 9, user 2 finds it on place 3; user 1 has none and is left out.
    assert places.metrics([3])["ItemHit@3"].tolist() == [0.0, 1.0]
    assert places.metrics([2])["ItemHit@2"].tolist() == [0.0, 0.0]


def test_a_slice_of_buckets_keeps_their_sids() -> None:
    sizes, beams = np.array([[2, 1], [1, 3]]), np.array([1, 0, 1])
    places = bucket_places(sizes, beams, np.array([0, 1, 1]))
    found = places.take(np.array([True, False, True])).metrics([1, 2])
    assert found["SidHit@1"].tolist() == [0.0, 0.0]
    assert found["SidHit@2"].tolist() == [1.0, 1.0]
    assert found["ItemHit@2"] == pytest.approx([0.0, 1 / 3])


@pytest.mark.parametrize("cells", [1, 7, 10_000])
def test_first_places_equal_a_loop_whatever_fits(
    cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_CELLS_AT_ONCE", cells)
    draw = np.random.default_rng(0)
    rows, row, wanted = (
        draw.integers(0, 9, (20, 6)),
        draw.integers(0, 20, 50),
        draw.integers(0, 9, 50),
    )
    found = ranking.first_places(rows, row, wanted)
    expected = [
        next((at for at, one in enumerate(rows[here]) if one == what), -1)
        for here, what in zip(row, wanted, strict=True)
    ]
    assert found.tolist() == expected
