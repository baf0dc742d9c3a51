"""Rows and files are checked without Ray: odd times, odd types, conventional names."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.data.checks import (
    Screen,
    TimeUnit,
    as_timestamps,
)
from forge_ray.data.importers import Chunk, RawFile, extra_schema, list_files
from forge_ray.data.sources import SourcesConfig, resolve
from forge_ray.errors import DataError
from tests.data.raw import write_events, write_vectors

SKIP = frozenset(["invalid_timestamp"])


@pytest.mark.parametrize(
    ("times", "expected", "kept"),
    [
        (pa.array([" 7", "+5", "-0", "1.5", None]), [7, 5, 0, 0, 0], [1, 1, 1, 0, 0]),
        (pa.array([7.0, 7.5, 1e19, float("nan"), -float("inf")]), [7, 0, 0, 0, 0], [1, 0, 0, 0, 0]),
        (pa.array([7, 2**63], pa.uint64()), [7, 0], [1, 0]),
        (pa.array([7_500], pa.timestamp("ms")), [7], [1]),
    ],
)
def test_times_that_fit_no_int64_are_rejected_row_by_row(
    times: pa.Array, expected: list[int], kept: list[int]
) -> None:
    chunk = Chunk(RawFile("log.csv", "csv", 0, 1), 1, pa.table({"timestamp": times}))
    screen = Screen(chunk, SKIP)
    assert as_timestamps(screen, "timestamp").tolist() == expected
    assert screen.keep.tolist() == [bool(one) for one in kept]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("s", [172_799, 172_800, 0]),
        ("ms", [172_799_999, 172_800_000, 0]),
        ("us", [172_799_999_000, 172_800_000_000, 0]),
        ("day", [1, 2, 0]),
    ],
)
@pytest.mark.parametrize("zone", [None, "Asia/Tokyo"])
def test_date_times_are_converted_to_the_unit_of_the_log(
    unit: TimeUnit, expected: list[int], zone: str | None
) -> None:
    times = pa.array([172_799_999, 172_800_000, None], pa.timestamp("ms", tz=zone))
    chunk = Chunk(RawFile("log.parquet", "parquet", 0, 1), 1, pa.table({"timestamp": times}))
    assert as_timestamps(Screen(chunk, SKIP), "timestamp", unit).tolist() == expected


def test_a_date_time_before_1970_is_negative_in_days_too() -> None:
    table = pa.table({"timestamp": pa.array([-1], pa.timestamp("s"))})
    screen = Screen(Chunk(RawFile("log.parquet", "parquet", 0, 1), 1, table), SKIP)
    with pytest.raises(DataError, match="must be >= 0"):
        as_timestamps(screen, "timestamp", "day")


def test_columns_that_cannot_be_unified_are_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": ["a"], "price": [1]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"item_id": ["b"], "price": ["x"]}), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"0\.parquet and the files beside it .* price"):
        extra_schema(list_files(str(tmp_path), field="items.path"), exclude=["item_id"])


def test_vectors_beside_the_log_are_found_in_any_format(tmp_path: Path) -> None:
    write_events(tmp_path, [("u", "a", 1)])
    table = pa.table({"item_id": ["a"], "embedding": [[1.0, 2.0]]})
    pq.write_table(table, tmp_path / "vectors.parquet")
    vectors = resolve(SourcesConfig(source=str(tmp_path))).vectors
    assert {name: Path(one.path).name for name, one in vectors.items()} == {
        "default": "vectors.parquet"
    }
    write_vectors(tmp_path, ["a"], [[1, 2]])
    with pytest.raises(DataError, match="one input named vectors"):
        resolve(SourcesConfig(source=str(tmp_path)))
