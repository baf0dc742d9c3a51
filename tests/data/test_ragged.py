"""Ragged against plain Python lists."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.ragged import Ragged

ROWS = st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=8)


def as_lists(ragged: Ragged) -> list[list[int]]:
    return [row.tolist() for row in ragged]


@settings(deadline=None)
@given(rows=ROWS)
def test_round_trips(rows: list[list[int]]) -> None:
    ragged = Ragged.from_lists(rows, dtype=np.int32)
    assert as_lists(ragged) == rows
    assert len(ragged) == len(rows)
    assert as_lists(Ragged.from_arrow(ragged.to_arrow())) == rows
    assert pickle.loads(pickle.dumps(ragged)) == ragged
    assert ragged.row_ids.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert ragged.positions.tolist() == [p for row in rows for p in range(len(row))]


@settings(deadline=None)
@given(rows=ROWS, count=st.integers(0, 7))
def test_tail_head_and_padding(rows: list[list[int]], count: int) -> None:
    ragged = Ragged.from_lists(rows, dtype=np.int64)
    assert as_lists(ragged.tail(count)) == [row[max(len(row) - count, 0) :] for row in rows]
    assert as_lists(ragged.head(count)) == [row[:count] for row in rows]
    for row, left, right in zip(
        rows, ragged.padded(count), ragged.padded(count, side="right"), strict=True
    ):
        kept = row[max(len(row) - count, 0) :]
        assert left.tolist() == [-1] * (count - len(kept)) + kept
        assert right.tolist() == row[:count] + [-1] * (count - len(row[:count]))


@settings(deadline=None)
@given(rows=ROWS.filter(bool), data=st.data())
def test_take_filter_map(rows: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.from_lists(rows, dtype=np.int64)
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    assert as_lists(ragged.take(picks)) == [rows[i] for i in picks]
    even = ragged.values % 2 == 0
    assert as_lists(ragged.filter(even)) == [[v for v in row if v % 2 == 0] for row in rows]
    assert as_lists(ragged.map(np.arange(100) * 2)) == [[2 * v for v in row] for row in rows]
    assert as_lists(Ragged.concatenate([ragged, ragged])) == rows + rows


def test_rows_follow_those_of_the_same_number() -> None:
    first = Ragged.from_lists([[1, 2], [], [3]], np.int32)
    second = Ragged.from_lists([[4], [5, 6], []], np.int32)
    assert first.followed_by(second) == Ragged.from_lists([[1, 2, 4], [5, 6], [3]], np.int32)


def test_arrow_slices_and_fixed_size_lists() -> None:
    column = pa.chunked_array([pa.array([[1], [2, 3]]), pa.array([[4, 5, 6]])])
    assert as_lists(Ragged.from_arrow(column)) == [[1], [2, 3], [4, 5, 6]]
    assert as_lists(Ragged.from_arrow(column.slice(1))) == [[2, 3], [4, 5, 6]]
    fixed = pa.array([[1, 2], [3, 4]], type=pa.list_(pa.int32(), 2))
    assert as_lists(Ragged.from_arrow(fixed.slice(1))) == [[3, 4]]


def test_rejects_null_rows_and_wrong_offsets() -> None:
    with pytest.raises(ValueError, match="no null rows, got 1"):
        Ragged.from_arrow(pa.array([[1], None]))
    with pytest.raises(ValueError, match="offsets must run from 0"):
        Ragged(np.arange(3), np.array([0, 2]))
    with pytest.raises(IndexError, match="row must be in"):
        Ragged.from_lists([[1]]).row(1)
