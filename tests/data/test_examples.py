"""Rows of sequences and their order: what is cut out, when, and how much of it at once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.examples import (
    BatchPlan,
    Prefixes,
    batch_order,
    in_groups,
    last_items,
    segment_rows,
    whole,
    windows,
)
from forge_ray.data.ragged import Ragged

LENGTHS = st.lists(st.integers(0, 40), max_size=30)


def counted(lengths: list[int]) -> Ragged:
    return Ragged.from_lengths(np.arange(sum(lengths)), np.array(lengths, dtype=np.int64))


def all_of(rows) -> Ragged:
    return rows.take(np.arange(len(rows)))


@given(lengths=LENGTHS, max_items=st.integers(1, 12), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_windows_hold_every_item_once_in_order(lengths, max_items, seed):
    sequences = counted(lengths)
    pieces = all_of(windows(sequences, max_items, np.random.default_rng(seed)))
    assert pieces.values.tolist() == sequences.values.tolist()
    assert pieces.lengths.max(initial=0) <= max_items


def test_windows_leave_short_sequences_whole():
    sequences = Ragged.from_lists([[1, 2, 3], [4]], dtype=np.int64)
    assert all_of(windows(sequences, 3, np.random.default_rng(0))) == sequences


def test_prefixes_end_in_every_item_but_the_first():
    sequences = Ragged.from_lists([[1, 2, 3, 4], [5], [], [6, 7]], dtype=np.int64)
    prefixes = all_of(Prefixes.of(sequences, 3))
    assert [row.tolist() for row in prefixes] == [[1, 2], [1, 2, 3], [2, 3, 4], [6, 7]]


@given(lengths=LENGTHS, max_items=st.integers(2, 12), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_any_prefixes_are_those_written_out(lengths, max_items, seed):
    sequences = counted(lengths)
    expected = [
        row[max(0, end - max_items) : end].tolist()
        for row in sequences
        for end in range(2, len(row) + 1)
    ]
    rows = Prefixes.of(sequences, max_items)
    order = np.random.default_rng(seed).permutation(len(rows))
    found = rows.take(order)
    assert [row.tolist() for row in found] == [expected[index] for index in order]
    assert found.lengths.tolist() == rows.lengths(order).tolist()


@given(lengths=LENGTHS, max_items=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_last_items_are_a_row_for_each_sequence_that_has_a_history(lengths, max_items):
    sequences = counted(lengths)
    rows = last_items(sequences, max_items)
    expected = [row[-max_items:].tolist() for row in sequences if len(row) > 1]
    assert [row.tolist() for row in all_of(rows)] == expected
    assert rows.lengths(np.arange(len(rows))).tolist() == [len(row) for row in expected]


@given(num=st.integers(0, 200), batch=st.integers(1, 9), window=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_batches_hold_every_row_once(num, batch, window):
    rows = whole(counted(np.random.default_rng(0).integers(1, 30, size=num).tolist()))
    rng = np.random.default_rng(1)
    batches = list(batch_order(rows, batch_rows=batch, window_batches=window, rng=rng))
    assert sorted(np.concatenate([[], *batches]).tolist()) == list(range(num))
    assert len(batches) == -(-num // batch)


def test_bucketing_pads_little():
    lengths = np.random.default_rng(0).geometric(0.1, size=4096)

    def padding(window: int) -> float:
        rng = np.random.default_rng(1)
        rows = whole(counted(lengths.tolist()))
        batches = batch_order(rows, batch_rows=64, window_batches=window, rng=rng)
        return 1 - lengths.sum() / sum(lengths[one].max() * len(one) for one in batches)

    assert padding(1) > 0.5
    assert padding(64) < 0.15


GOLDEN = {
    "prefix": [
        [11, 12, 11, 12, 13, 3, 4, 5, 6],
        [2, 3, 4, 5, 12, 13, 14, 15, 14, 15, 16, 17],
        [7, 8, 0, 1, 2, 0, 1, 2, 3],
        [1, 2, 3, 4, 15, 16, 17, 18, 13, 14, 15, 16],
        [0, 1, 7, 8, 9, 11, 12, 13, 14],
        [16, 17, 18, 19],
    ],
    "window": [[15, 16, 17, 18, 11, 12, 13, 14, 2, 3, 4, 5], [10, 19, 7, 8, 9], [6, 0, 1]],
    "last": [[7, 8, 9, 16, 17, 18, 19, 3, 4, 5, 6]],
    "whole": [[0, 1, 2, 3, 4, 5, 6, *range(11, 20)], [10, 7, 8, 9]],
}


def test_the_order_is_that_of_runs_from_before():
    """A run that goes on under a newer version sees the rows that it had not seen."""
    sequences = counted([7, 0, 3, 1, 9])
    for mode, expected in GOLDEN.items():
        plan = BatchPlan(batch_rows=3, max_items=4, mode=mode, window_batches=2, seed=5)
        rows, batches = segment_rows(sequences, plan, epoch=2, segment=1)
        assert [rows.take(one).values.tolist() for one in batches] == expected


@given(lengths=LENGTHS, batch=st.integers(1, 9), num_values=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_groups_are_all_batches_in_order_and_small(lengths, batch, num_values):
    rows = whole(counted(lengths))
    rng = np.random.default_rng(1)
    batches = list(batch_order(rows, batch_rows=batch, window_batches=2, rng=rng))
    groups = list(in_groups(rows, batches, num_values=num_values))
    assert [one.tolist() for group in groups for one in group] == [one.tolist() for one in batches]
    for group in groups:
        assert len(group) == 1 or sum(rows.lengths(one).sum() for one in group) <= num_values


@pytest.mark.parametrize("mode", ["prefix", "last", "window", "whole"])
def test_an_item_takes_a_few_bytes_whatever_rows_it_is_in(mode):
    """A row for every item, with a history of up to fifty: 200 bytes an item where all are held."""
    plan = BatchPlan(batch_rows=128, max_items=51, mode=mode, window_batches=8, seed=0)

    def peak(num: int) -> int:
        sequences = Ragged.from_lengths(np.zeros(num * 100, np.int32), np.full(num, 100))
        tracemalloc.start()
        rows, batches = segment_rows(sequences, plan, epoch=0, segment=0)
        for group in in_groups(rows, batches, num_values=8192):
            rows.take(np.concatenate(group))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(200), peak(1000)
    assert (many - few) / 80_000 < 8
