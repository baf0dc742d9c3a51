"""Rows of different lengths, held as two flat arrays.

Knows offsets and values only; it knows nothing about users, items or files. Every operation is a
handful of NumPy calls, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

ListLike: TypeAlias = pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray | pa.ChunkedArray


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """B rows of varying length, the layout of an Arrow list column.

    Attributes:
        values: ``[T]`` all rows one after the other.
        offsets: ``[B + 1]`` int64; row i is ``values[offsets[i]:offsets[i + 1]]``.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check that the offsets describe exactly the values."""
        offsets = self.offsets
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(self.values):
            span = "empty" if len(offsets) == 0 else f"{offsets[0]}..{offsets[-1]}"
            raise ValueError(
                f"offsets must run from 0 to len(values)={len(self.values)}, got {span}. "
                "Build the rows with Ragged.from_lists, from_lengths or from_arrow."
            )

    @classmethod
    def from_lists(cls, rows: Iterable[Sequence[Any]], dtype: DTypeLike | None = None) -> Ragged:
        """Build from Python sequences or arrays (tests and small inputs).

        Args:
            rows: one sequence per row; rows may be empty.
            dtype: dtype of the values; by default NumPy's choice, int64 when nothing is known.
        """
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        lengths = np.fromiter((len(a) for a in arrays), dtype=np.int64, count=len(arrays))
        filled = [a for a in arrays if len(a)]
        empty = np.empty(0, dtype=np.int64 if dtype is None else dtype)
        return cls.from_lengths(np.concatenate(filled) if filled else empty, lengths)

    @classmethod
    def from_lengths(cls, values: NDArray[Any], lengths: NDArray[np.integer[Any]]) -> Ragged:
        """Build from flat values ``[T]`` and row lengths ``[B]`` that sum to T."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(values, offsets)

    @classmethod
    def from_arrow(cls, column: ListLike) -> Ragged:
        """View an Arrow list column without copying where Arrow allows it.

        Args:
            column: list, large_list or fixed_size_list array, chunked or not, without null rows.

        Raises:
            ValueError: a row is null.
        """
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if array.null_count:
            raise ValueError(
                f"list column must hold no null rows, got {array.null_count}. "
                "Use empty lists for rows without values."
            )
        values = array.flatten().to_numpy(zero_copy_only=False)
        if isinstance(array, pa.FixedSizeListArray):
            width = array.type.list_size
            return cls(values, np.arange(len(array) + 1, dtype=np.int64) * width)
        offsets = array.offsets.to_numpy().astype(np.int64)
        return cls(values, offsets - offsets[0])

    def to_arrow(self) -> pa.ListArray | pa.LargeListArray:
        """Return the rows as an Arrow list array (``large_list`` above 2^31 values)."""
        if len(self.values) < 2**31:
            offsets = pa.array(self.offsets.astype(np.int32))
            return pa.ListArray.from_arrays(offsets, pa.array(self.values))
        return pa.LargeListArray.from_arrays(pa.array(self.offsets), pa.array(self.values))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self.row(index) for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Row lengths ``[B]`` int64."""
        return np.diff(self.offsets)

    @property
    def row_ids(self) -> NDArray[np.int64]:
        """Row number of every value ``[T]`` int64."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Place of every value inside its row ``[T]`` int64, counted from 0."""
        return np.arange(len(self.values), dtype=np.int64) - np.repeat(
            self.offsets[:-1], self.lengths
        )

    def row(self, index: int) -> NDArray[Any]:
        """Return row ``index`` as a view."""
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in 0..{len(self) - 1}, got {index}.")
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def slices(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Ragged:
        """Cut one contiguous piece per output row out of the flat values.

        Args:
            starts: ``[R]`` first flat position of each piece.
            lengths: ``[R]`` piece lengths, all >= 0.
        """
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        gather = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[gather], offsets)

    def take(self, rows: NDArray[Any] | Sequence[int]) -> Ragged:
        """Select rows by index ``[R]`` or boolean mask ``[B]``, in the order given."""
        index = np.asarray(rows)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        starts = self.offsets[:-1][index]
        return self.slices(starts, self.offsets[1:][index] - starts)

    def tail(self, count: int) -> Ragged:
        """Keep the last ``count`` values of each row (all of them in shorter rows)."""
        lengths = np.minimum(self.lengths, max(count, 0))
        return self.slices(self.offsets[1:] - lengths, lengths)

    def head(self, count: int) -> Ragged:
        """Keep the first ``count`` values of each row (all of them in shorter rows)."""
        return self.slices(self.offsets[:-1], np.minimum(self.lengths, max(count, 0)))

    def followed_by(self, other: Ragged) -> Ragged:
        """Put each row of another ``[B]`` behind the row here of the same number."""
        rows = np.concatenate([self.row_ids, other.row_ids])
        order = np.argsort(rows, kind="stable")
        values = np.concatenate([self.values, other.values])
        return Ragged.from_lengths(values[order], self.lengths + other.lengths)

    def filter(self, mask: NDArray[np.bool_]) -> Ragged:
        """Keep the values where ``mask`` ``[T]`` holds; rows stay, possibly empty."""
        kept = np.zeros(len(self.values) + 1, dtype=np.int64)
        np.cumsum(mask, out=kept[1:])
        return Ragged(self.values[mask], kept[self.offsets])

    def map(self, table: NDArray[Any]) -> Ragged:
        """Replace every value v by ``table[v]``; the values must be integers."""
        return Ragged(table[self.values], self.offsets)

    def padded(
        self, length: int | None = None, side: Literal["left", "right"] = "left", fill: Any = -1
    ) -> NDArray[Any]:
        """Return a rectangle, padded on one side.

        Args:
            length: width T of the result; by default the longest row. Longer rows lose their
                oldest values with ``side="left"`` and their newest with ``side="right"``.
            side: where the padding goes.
            fill: the padding value.

        Returns:
            ``[B, T]`` of the dtype of ``values``.
        """
        width = int(self.lengths.max(initial=0)) if length is None else length
        rows = self.tail(width) if side == "left" else self.head(width)
        out = np.full((len(self), width), fill, dtype=self.values.dtype)
        columns = rows.positions
        if side == "left":
            columns = columns + np.repeat(width - rows.lengths, rows.lengths)
        out[rows.row_ids, columns] = rows.values
        return out

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        """Stack the rows of several Ragged, in order; at least one is needed."""
        values = np.concatenate([part.values for part in parts])
        return cls.from_lengths(values, np.concatenate([part.lengths for part in parts]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ragged):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(
            self.values, other.values
        )

    __hash__ = None  # type: ignore[assignment]
