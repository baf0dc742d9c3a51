"""Resolvers: capacity kept, no item lost, and the same answer whatever the order of rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.config import from_mapping
from forge_ray.errors import ConfigError
from forge_ray.sid.resolvers.base import (
    BucketConfig,
    ExtraTokenConfig,
    KnnCapConfig,
    Resolution,
    hash_ids,
    resolve,
)
from forge_ray.sid.table import prefix_keys

SIZES = (3, 2, 6)
CASE = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(1, 7),
    st.sampled_from(["row", "priority"]),
)


def catalogue(seed: int, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Skewed codes, ids and a full preference order over last codes for every item."""
    rng = np.random.default_rng(seed)
    codes = np.minimum(rng.geometric(0.6, size=(num_items, 3)) - 1, np.array(SIZES) - 1)
    ids = rng.permutation(10 * num_items)[:num_items]
    wishes = np.argsort(rng.random((num_items, SIZES[-1])), axis=1)
    return codes, ids, wishes


def source(wishes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: wishes[rows]


def occupancy(result: Resolution) -> np.ndarray:
    keys = prefix_keys(result.codes, result.codebook_sizes, len(result.codebook_sizes))
    return np.unique(keys, return_counts=True)[1]


def oracle(
    codes: np.ndarray, ids: np.ndarray, wishes: np.ndarray, config: KnnCapConfig
) -> np.ndarray:
    """The policy as its pseudo-code reads, one item at a time."""
    order = sorted(range(len(codes)), key=lambda i: (int(hash_ids(ids)[i]), str(ids[i])))
    count: dict[tuple[int, ...], int] = {}
    pool = []
    out = codes.copy()
    for i in order:
        sid = tuple(codes[i])
        if count.get(sid, 0) < config.cap:
            count[sid] = count.get(sid, 0) + 1
        else:
            pool.append(i)
    options = {i: [c for c in wishes[i] if c != codes[i, -1]][: config.candidates] for i in pool}

    def attempt(i: int, code: int) -> bool:
        sid = (*codes[i, :-1], code)
        if count.get(sid, 0) >= config.cap:
            return False
        count[sid] = count.get(sid, 0) + 1
        out[i, -1] = code
        return True

    if config.order == "row":
        for i in pool:
            any(attempt(i, code) for code in options[i])
        return out
    for p in range(config.candidates):
        pool = [i for i in pool if p >= len(options[i]) or not attempt(i, options[i][p])]
    return out


@settings(max_examples=200, deadline=None)
@given(CASE)
def test_knn_cap_equals_the_one_item_at_a_time_oracle(case: tuple[int, int, int, int, str]) -> None:
    seed, num_items, cap, limit, order = case
    codes, ids, wishes = catalogue(seed, num_items)
    config = KnnCapConfig(cap=cap, candidates=limit, order=order)
    result = resolve(config, codes, SIZES, item_ids=ids, candidates=source(wishes))
    assert np.array_equal(result.codes, oracle(codes, ids, wishes, config))


@settings(max_examples=100, deadline=None)
@given(CASE, st.sampled_from(["knn", "random"]))
def test_knn_cap_invariants(case: tuple[int, int, int, int, str], kind: str) -> None:
    seed, num_items, cap, limit, order = case
    codes, ids, wishes = catalogue(seed, num_items)
    config = KnnCapConfig(cap=cap, candidates=limit, order=order, source=kind)
    result = resolve(config, codes, SIZES, item_ids=ids, candidates=source(wishes))
    assert np.array_equal(result.codes[:, :-1], codes[:, :-1])
    placed = Resolution(result.codes[~result.over_capacity], SIZES, result.over_capacity)
    assert occupancy(placed).max(initial=0) <= cap
    assert np.array_equal(result.codes[result.over_capacity], codes[result.over_capacity])

    again = resolve(config, result.codes, SIZES, item_ids=ids, candidates=source(wishes))
    assert np.array_equal(again.codes, result.codes)
    assert np.array_equal(again.over_capacity, result.over_capacity)

    shuffle = np.random.default_rng(seed + 1).permutation(num_items)
    permuted = resolve(
        config, codes[shuffle], SIZES, item_ids=ids[shuffle], candidates=source(wishes[shuffle])
    )
    assert np.array_equal(permuted.codes, result.codes[shuffle])


@settings(max_examples=100, deadline=None)
@given(CASE, st.sampled_from(["bucket", "extra_token", "knn_cap"]))
def test_appending_items_changes_no_published_code(
    case: tuple[int, int, int, int, str], kind: str
) -> None:
    seed, num_items, cap, limit, order = case
    codes, ids, wishes = catalogue(seed, num_items)
    config = {
        "bucket": BucketConfig(),
        "extra_token": ExtraTokenConfig(),
        "knn_cap": KnnCapConfig(cap=cap, candidates=limit, order=order),
    }[kind]
    old = num_items // 2
    first = resolve(config, codes[:old], SIZES, item_ids=ids[:old], candidates=source(wishes[:old]))
    published = np.full((num_items, first.codes.shape[1]), -1)
    published[:old] = first.codes
    result = resolve(
        config, codes, SIZES, item_ids=ids, candidates=source(wishes), published=published
    )
    width = first.codes.shape[1]
    assert np.array_equal(result.codes[:old, :width], first.codes)
    assert len(result.codes) == num_items
    if kind == "extra_token":
        assert occupancy(result).max() == 1
    if kind == "knn_cap":
        newcomers = ~result.over_capacity
        newcomers[:old] &= ~first.over_capacity
        placed = Resolution(result.codes[newcomers], SIZES, newcomers)
        assert occupancy(placed).max(initial=0) <= cap


def test_extra_token_makes_sids_unique_and_stays_when_nothing_collides() -> None:
    codes, ids, _ = catalogue(3, 60)
    result = resolve(ExtraTokenConfig(), codes, SIZES, item_ids=ids)
    assert occupancy(result).max() == 1
    assert result.codebook_sizes[-1] == result.report["max_bucket_before"]
    assert np.array_equal(result.codes[:, :3], codes)
    again = resolve(ExtraTokenConfig(), result.codes, result.codebook_sizes, item_ids=ids)
    assert np.array_equal(again.codes, result.codes)


def test_bucket_changes_nothing_and_reports_what_it_left() -> None:
    codes, ids, _ = catalogue(3, 60)
    result = resolve(BucketConfig(), codes, SIZES, item_ids=ids)
    assert np.array_equal(result.codes, codes)
    assert result.report["moved"] == 0
    assert result.report["max_bucket_after"] == occupancy(result).max()


def test_order_and_seed_change_the_result() -> None:
    codes, ids, wishes = catalogue(5, 60)
    codes[:] = codes[0]
    by = {
        order: resolve(
            KnnCapConfig(cap=2, order=order), codes, SIZES, item_ids=ids, candidates=source(wishes)
        ).codes
        for order in ("row", "priority")
    }
    assert not np.array_equal(by["row"], by["priority"])
    drawn = [
        resolve(KnnCapConfig(cap=2, source="random", seed=s), codes, SIZES, item_ids=ids).codes
        for s in (0, 1)
    ]
    assert not np.array_equal(*drawn)


def test_an_integer_id_hashes_as_its_spelling_and_alone() -> None:
    numbers = np.array([7, 123456, 7_000_000_000])
    assert np.array_equal(hash_ids(numbers), hash_ids(numbers.astype(str)))
    assert hash_ids(np.array(["7"]))[0] == hash_ids(numbers)[0]
    assert len(np.unique(hash_ids(np.arange(100_000)))) == 100_000


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="cap must be >= 1"):
        from_mapping(KnnCapConfig, {"cap": 0})
    codes, ids, _ = catalogue(0, 10)
    with pytest.raises(ConfigError, match="source must be 'random'"):
        resolve(KnnCapConfig(), codes, SIZES, item_ids=ids)


def test_a_collapsed_prefix_of_many_items_is_resolved_in_array_time() -> None:
    rng = np.random.default_rng(0)
    codes = np.zeros((5000, 3), dtype=np.int64)
    wishes = np.argsort(rng.random((5000, 256)), axis=1)
    result = resolve(
        KnnCapConfig(cap=5),
        codes,
        (256, 256, 256),
        item_ids=np.arange(5000),
        candidates=source(wishes),
    )
    assert result.report["unplaced"] == 5000 - 5 * 256
    assert result.report["max_bucket_before"] == 5000
