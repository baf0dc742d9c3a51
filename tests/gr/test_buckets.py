"""Bucket expansion and seen-item subtraction against loops over users."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.ragged import Ragged
from forge_ray.gr.bucket_order import DenseOrder
from forge_ray.gr.buckets import ItemBuckets


def world(seed: int, *, num_items: int, num_sids: int, num_users: int, width: int):
    """Random buckets, beams without repeats (some dead) and histories."""
    rng = np.random.default_rng(seed)
    rank = rng.integers(0, num_sids, num_items)
    counts = rng.integers(0, 4, num_items)
    buckets = ItemBuckets.build(rank, num_sids=num_sids, train_counts=counts)
    width = min(width, num_sids)
    beams = np.stack([rng.permutation(num_sids)[:width] for _ in range(num_users)])
    live = rng.integers(0, width + 1, num_users)
    beams[np.arange(width) >= live[:, None]] = -1
    histories = Ragged.from_lists(
        [rng.integers(0, num_items, rng.integers(0, 6)) for _ in range(num_users)], np.int64
    )
    scores = -np.sort(rng.random((num_users, width)).astype(np.float32), axis=1)
    return buckets, rank, counts, beams, scores, histories


worlds = st.tuples(
    st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 12), st.integers(1, 5),
    st.integers(1, 12),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(worlds, st.integers(1, 15), st.booleans())
def test_expansion_equals_a_loop(parts, k, exclude) -> None:
    seed, num_items, num_sids, num_users, width = parts
    buckets, rank, counts, beams, scores, histories = world(
        seed, num_items=num_items, num_sids=num_sids, num_users=num_users, width=width
    )
    lists = buckets.expand(beams, scores, k=k, seen=histories if exclude else None)
    for user in range(num_users):
        seen = set(histories.row(user).tolist()) if exclude else set()
        expected = [
            (item, scores[user, place])
            for place, sid in enumerate(beams[user])
            if sid >= 0
            for item in sorted(np.flatnonzero(rank == sid), key=lambda i: (-counts[i], i))
            if item not in seen
        ][:k]
        length = len(expected)
        assert lists.lengths[user] == length
        assert lists.items[user, :length].tolist() == [item for item, _ in expected]
        assert lists.scores[user, :length].tolist() == [score for _, score in expected]
        assert (lists.items[user, length:] == -1).all()
        assert np.isneginf(lists.scores[user, length:]).all()


@settings(max_examples=80, deadline=None)
@given(worlds)
def test_sizes_and_seen_sizes_equal_a_loop(parts) -> None:
    seed, num_items, num_sids, num_users, width = parts
    buckets, rank, _, beams, _, histories = world(
        seed, num_items=num_items, num_sids=num_sids, num_users=num_users, width=width
    )
    sizes, seen = buckets.sizes(beams), buckets.seen_sizes(beams, histories)
    for user, place in np.ndindex(*beams.shape):
        sid = beams[user, place]
        assert sizes[user, place] == (0 if sid < 0 else int((rank == sid).sum()))
        known = set(histories.row(user).tolist())
        assert seen[user, place] == len({i for i in known if sid >= 0 and rank[i] == sid})


def test_bucket_order_is_popularity_then_item_index() -> None:
    rank = np.array([0, 0, 0, 0, 1])
    counts = np.array([1, 5, 1, 7, 9])
    buckets = ItemBuckets.build(rank, num_sids=2, train_counts=counts)
    lists = buckets.expand(np.array([[1, 0]]), np.array([[-1.0, -2.0]], np.float32), k=5)
    assert lists.items.tolist() == [[4, 3, 1, 0, 2]]
    assert lists.scores.tolist() == [[-1.0, -2.0, -2.0, -2.0, -2.0]]


@settings(max_examples=60, deadline=None)
@given(worlds, st.integers(1, 15), st.booleans())
def test_affinity_and_hidden_items_equal_a_loop(parts, k, exclude) -> None:
    seed, num_items, num_sids, num_users, width = parts
    _, rank, counts, beams, scores, histories = world(
        seed, num_items=num_items, num_sids=num_sids, num_users=num_users, width=width
    )
    rng = np.random.default_rng(seed)
    rank = np.where(rng.random(num_items) < 0.3, -1, rank)
    buckets = ItemBuckets.build(rank, num_sids=num_sids, train_counts=counts)
    care = rng.integers(0, 3, (num_users, num_items)).astype(np.float32)
    seen_sizes = buckets.seen_sizes(beams, histories)
    lists = buckets.expand(
        beams,
        scores,
        k=k,
        seen=histories if exclude else None,
        affinity=lambda users, items: care[users, items],
    )
    for user in range(num_users):
        history = set(histories.row(user).tolist())
        seen = history if exclude else set()
        expected = [
            item
            for sid in beams[user]
            if sid >= 0
            for item in sorted(
                np.flatnonzero(rank == sid), key=lambda i: (-care[user, i], -counts[i], i)
            )
            if item not in seen
        ][:k]
        assert lists.items[user, : len(expected)].tolist() == expected
        assert (lists.items[user, len(expected) :] == -1).all()
        for place, sid in enumerate(beams[user]):
            inside = len({i for i in history if sid >= 0 and rank[i] == sid})
            assert seen_sizes[user, place] == inside


def test_dense_order_puts_the_nearest_item_of_a_bucket_first() -> None:
    vectors = np.array([[1, 0], [0, 3], [5, 1], [1, 5], [0, 0]], np.float32)
    order = DenseOrder.of(vectors, max_history=2)
    # Users: newest two items are 0 and 0; newest two are 1 and 1; nothing known.
    histories = Ragged.from_lists([[1, 1, 0, 0], [0, 1, 1], []], np.int64)
    buckets = ItemBuckets.build(
        np.array([1, 1, 0, 0, 0]), num_sids=2, train_counts=np.array([0, 0, 1, 2, 3])
    )
    lists = buckets.expand(
        np.array([[0, 1]] * 3),
        np.zeros((3, 2), np.float32),
        k=3,
        affinity=order.profiles(histories),
    )
    assert lists.items.tolist() == [[2, 3, 4], [3, 2, 4], [4, 3, 2]]


def test_a_huge_bucket_costs_no_more_than_the_list() -> None:
    buckets = ItemBuckets.build(
        np.zeros(200_000, np.int64), num_sids=1, train_counts=np.zeros(200_000, np.int64)
    )
    seen = Ragged.from_lists([[0, 1, 2]] * 50, np.int64)
    lists = buckets.expand(
        np.zeros((50, 1), np.int64), np.zeros((50, 1), np.float32), k=4, seen=seen
    )
    assert (lists.items == [3, 4, 5, 6]).all()
