"""The prefix index against sets of tuples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.errors import DataError
from forge_ray.gr.prefix_index import PrefixIndex
from tests.gr.generators import random_codes

tables = st.lists(st.integers(1, 6), min_size=1, max_size=8).flatmap(
    lambda sizes: st.tuples(
        st.just(tuple(sizes)),
        st.lists(st.tuples(*(st.integers(0, size - 1) for size in sizes)), min_size=1, max_size=30),
    )
)


def sorted_prefixes(rows: Sequence[tuple[int, ...]], depth: int) -> list[tuple[int, ...]]:
    return sorted({row[:depth] for row in rows})


@settings(max_examples=60, deadline=None)
@given(tables)
def test_sids_are_the_sorted_distinct_rows(
    table: tuple[tuple[int, ...], list[tuple[int, ...]]],
) -> None:
    sizes, rows = table
    index = PrefixIndex.build(np.array(rows), sizes)
    expected = sorted_prefixes(rows, len(sizes))
    assert [tuple(sid) for sid in index.sids().tolist()] == expected
    assert index.codebook_sizes == sizes
    assert torch.equal(index.find(index.sids()), torch.arange(len(expected)))


@settings(max_examples=60, deadline=None)
@given(tables)
def test_children_and_masks_equal_brute_force(
    table: tuple[tuple[int, ...], list[tuple[int, ...]]],
) -> None:
    sizes, rows = table
    index = PrefixIndex.build(np.array(rows), sizes)
    for level in range(len(sizes)):
        parents = sorted_prefixes(rows, level)
        grown = sorted_prefixes(rows, level + 1)
        kids = index.children(level, torch.arange(len(parents)))
        mask = index.allowed(level, torch.arange(len(parents)))
        for row, parent in enumerate(parents):
            expected = [prefix for prefix in grown if prefix[:level] == parent]
            valid = kids.valid[row]
            assert kids.codes[row][valid].tolist() == [prefix[-1] for prefix in expected]
            assert kids.rows[row][valid].tolist() == [grown.index(p) for p in expected]
            assert mask[row].nonzero().flatten().tolist() == [p[-1] for p in expected]


@settings(max_examples=60, deadline=None)
@given(tables, st.integers(0, 2**31))
def test_find_equals_set_membership(
    table: tuple[tuple[int, ...], list[tuple[int, ...]]], seed: int
) -> None:
    sizes, rows = table
    index = PrefixIndex.build(np.array(rows), sizes)
    queries = random_codes(50, sizes, seed=seed).astype(np.int64)
    expected = sorted_prefixes(rows, len(sizes))
    found = [expected.index(q) if q in expected else -1 for q in map(tuple, queries.tolist())]
    assert index.find(torch.from_numpy(queries)).tolist() == found


def test_dead_and_foreign_prefixes_have_no_continuation() -> None:
    index = PrefixIndex.build(np.array([[0, 1], [2, 3]]), (4, 4))
    assert not index.children(1, torch.tensor([-1])).valid.any()
    assert not index.allowed(1, torch.tensor([-1])).any()
    assert index.find(torch.tensor([[0, 3], [1, 1], [2, 3], [0, 4], [0, -1]])).tolist() == [
        -1, -1, 1, -1, -1,
    ]  # fmt: skip


def test_eight_levels_of_8192_do_not_overflow() -> None:
    sizes = (8192,) * 8
    codes = random_codes(2_000, sizes)
    index = PrefixIndex.build(codes, sizes)
    assert index.sids().tolist() == sorted(map(list, {*map(tuple, codes.tolist())}))


def test_rebuilding_from_shuffled_rows_gives_the_same_index() -> None:
    codes = random_codes(500, (16, 4, 16), seed=3)
    shuffled = np.random.default_rng(0).permutation(codes)
    first = PrefixIndex.build(codes, (16, 4, 16))
    second = PrefixIndex.build(shuffled, (16, 4, 16))
    for one, other in zip(first.levels, second.levels, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.offsets, other.offsets)


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (np.zeros((0, 2), np.int64), (4, 4), r"codes must have shape \[N >= 1, L = 2\]"),
        (np.zeros((3, 2), np.int64), (4, 4, 4), r"got \[3, 2\]"),
        (np.array([[0, 4]]), (4, 4), r"codes\[:, 1\] must be in \[0, 4\), got 4..4"),
        (np.array([[-1, 0]]), (4, 4), r"codes\[:, 0\] must be in \[0, 4\), got -1"),
    ],
)
def test_bad_tables_are_refused(
    codes: np.ndarray[tuple[int, int], np.dtype[np.int64]], sizes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        PrefixIndex.build(codes, sizes)
