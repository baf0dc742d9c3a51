"""The rules that rows of users' files must keep, and what happens to rows that break one.

A chunk of raw rows goes in; checked arrays come out, or a DataError that names file, row, column
and value. A cause listed in ``skip`` leaves its rows out instead and counts them. Knows nothing of
Ray or of files beyond their names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from forge_ray.data.importers import Chunk
from forge_ray.data.tasks import Ledger
from forge_ray.errors import ConfigError, DataError

SKIPPABLE = {
    "empty_user": "interactions without a user id",
    "empty_item": "rows without an item id",
    "unknown_item": "interactions with an item that the catalogue lacks",
    "invalid_timestamp": "interactions whose timestamp is missing or no whole number",
    "negative_timestamp": "interactions before time 0",
    "duplicate_item": "items after the first with the same id",
    "missing_attribute": "items without a value in a column of `items.required`, with their "
    "interactions",
    "null_vector": "items whose vector is null or holds a null, NaN or infinity",
    "unknown_vector": "vectors of items that the catalogue lacks",
    "missing_vector": "items without a vector, with their interactions",
}
TimeUnit = Literal["s", "ms", "us", "day"]


def check_skip(skip: list[str]) -> None:
    """Check the names in a ``skip`` list.

    Raises:
        ConfigError: a name is not among `SKIPPABLE`.
    """
    for cause in skip:
        if cause not in SKIPPABLE:
            raise ConfigError(
                f"skip must name causes among {sorted(SKIPPABLE)}, got {cause!r}. Correct the name."
            )


@dataclass(slots=True)
class Screen:
    """Decides row by row over one chunk.

    Attributes:
        chunk: the rows under test.
        skip: causes to leave out and count, rather than fail on.
        keep: ``[n]`` rows that passed so far.
        ledger: rows left out.
    """

    chunk: Chunk
    skip: frozenset[str]
    keep: NDArray[np.bool_] = field(init=False)
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.keep = np.ones(self.chunk.table.num_rows, dtype=bool)

    def reject(self, cause: str, bad: NDArray[np.bool_], *, column: str, rule: str) -> None:
        """Fail on, or leave out, the rows where ``bad`` ``[n]`` holds.

        Args:
            cause: name in `SKIPPABLE`.
            bad: rows that break the rule; rows left out before are not counted again.
            column: our name of the column with the offending value.
            rule: what a value must be, for the message.

        Raises:
            DataError: a row is bad and the cause is not to be skipped.
        """
        bad = bad & self.keep
        count = int(bad.sum())
        if not count:
            return
        row = int(np.argmax(bad))
        value = short(self.chunk.table[column][row].as_py())
        broken = (
            f"{self.chunk.file.uri} row {self.chunk.first_row + row}: {column} must {rule}, "
            f"got {value}"
        )
        if cause not in self.skip:
            raise DataError(
                f"{broken} ({count} such rows within {len(bad)}). Correct the file, or add "
                f"{cause} to `skip` to leave such rows out and count them."
            )
        self.ledger.add(cause, count, broken)
        self.keep &= ~bad

    @property
    def rows(self) -> NDArray[np.int64]:
        """Row numbers in the file of the rows kept."""
        return np.flatnonzero(self.keep) + self.chunk.first_row


def short(value: Any) -> str:
    """Spell a value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def as_ids(chunk: Chunk, column: str) -> pa.Array:
    """Return an id column as strings; nulls stay.

    Raises:
        DataError: the column is neither text nor whole numbers.
    """
    array = _flat(chunk.table[column])
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if pa.types.is_null(kind):
        return array.cast(pa.string())
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
    ):
        raise _wrong_type(chunk, column, "text or whole numbers", kind)
    return array.cast(pa.string())


def is_empty(ids: pa.Array) -> NDArray[np.bool_]:
    """Mark ids that are null or the empty string."""
    return _numpy(pc.fill_null(pc.equal(ids, ""), True))


def as_timestamps(screen: Screen, column: str, unit: TimeUnit = "s") -> NDArray[np.int64]:
    """Return a time column as int64, bad values rejected as 0.

    Args:
        screen: the chunk under test.
        column: our name of the column.
        unit: what date-time types are converted to, rounding down; numbers are taken as they are.

    Raises:
        DataError: the column's type cannot hold times, or a value is no whole number >= 0 and its
            cause is not to be skipped.
    """
    array = _flat(screen.chunk.table[column])
    kind = array.type
    if pa.types.is_timestamp(kind):
        array = _since_1970(array, unit)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        whole = pc.match_substring_regex(array, r"^\s*[+-]?\d{1,18}\s*$")
        array = pc.ascii_ltrim(pc.ascii_trim_whitespace(array), "+")  # Arrow parses no plus sign
        array = pc.if_else(whole, array, None).cast(pa.int64())
    elif pa.types.is_floating(kind):
        whole = pc.and_(pc.less(pc.abs(array), 2.0**63), pc.equal(array, pc.floor(array)))
        array = pc.if_else(whole, array, None).cast(pa.int64())
    elif pa.types.is_uint64(kind):
        array = pc.if_else(pc.less(array, pa.scalar(2**63, pa.uint64())), array, None).cast(
            pa.int64()
        )
    elif pa.types.is_integer(kind) or pa.types.is_null(kind):
        array = array.cast(pa.int64())
    else:
        raise _wrong_type(screen.chunk, column, "whole numbers or date-times", kind)
    invalid = _numpy(pc.is_null(array))
    screen.reject("invalid_timestamp", invalid, column=column, rule="be a whole number (int64)")
    times = _numpy(pc.fill_null(array, 0)).astype(np.int64)
    screen.reject("negative_timestamp", times < 0, column=column, rule="be >= 0")
    return times


def _since_1970(times: pa.Array, unit: TimeUnit) -> pa.Array:
    if unit != "day":
        return times.cast(pa.timestamp(unit, tz=times.type.tz), safe=False).cast(pa.int64())
    # Through whole numbers, which drop the time zone: days begin at midnight UTC.
    seconds = times.cast(pa.timestamp("s", tz=times.type.tz), safe=False).cast(pa.int64())
    return seconds.cast(pa.timestamp("s")).cast(pa.date32()).cast(pa.int32()).cast(pa.int64())


def as_matrix(screen: Screen, column: str, dim: int | None) -> NDArray[Any]:
    """Return a vector column as ``[n, D]`` floats, bad rows rejected as zeros.

    Args:
        screen: the chunk under test.
        column: our name of the column: lists of numbers.
        dim: the width D every vector must have; None takes that of the first row with a vector.

    Raises:
        DataError: the column holds no lists of numbers, a vector has another width, or one is null
            or not finite and that cause is not to be skipped.
    """
    array = _flat(screen.chunk.table[column])
    value_type = getattr(array.type, "value_type", None)
    if value_type is None or not (
        pa.types.is_floating(value_type) or pa.types.is_integer(value_type)
    ):
        raise _wrong_type(screen.chunk, column, "lists of numbers", array.type)
    missing = _numpy(pc.is_null(array))
    screen.reject("null_vector", missing, column=column, rule="not be null")
    lengths = _numpy(pc.fill_null(pc.list_value_length(array), -1)).astype(np.int64)
    present = ~missing
    if not present.any():
        return np.zeros((len(array), dim or 0), dtype=np.float32)
    width = int(lengths[present][0]) if dim is None else dim
    _reject_ragged(screen, column, present & (lengths != width), lengths, width)
    dtype = np.float16 if pa.types.is_float16(value_type) else np.float32
    matrix = np.zeros((len(array), width), dtype=dtype)
    # flatten() leaves the values of null lists out; null elements come as NaN.
    flat = array.flatten().cast(pa.float16() if dtype == np.float16 else pa.float32(), safe=False)
    matrix[present] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    bad = np.asarray(~np.isfinite(matrix).all(axis=1))
    screen.reject("null_vector", bad, column=column, rule="hold finite numbers only")
    return matrix


def _reject_ragged(
    screen: Screen, column: str, bad: NDArray[np.bool_], lengths: NDArray[np.int64], width: int
) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"{screen.chunk.file.uri} row {screen.chunk.first_row + row}: {column} must have "
            f"{width} numbers as the vectors before it, got {lengths[row]}. "
            "Write vectors of one width."
        )


def _wrong_type(chunk: Chunk, column: str, wanted: str, kind: pa.DataType) -> DataError:
    return DataError(
        f"{chunk.file.uri}: column {column} must hold {wanted}, got type {kind}. "
        "Convert the column, or map another one."
    )


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _numpy(array: pa.Array) -> NDArray[Any]:
    return array.to_numpy(zero_copy_only=False)
