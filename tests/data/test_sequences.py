"""Rows of sequences as events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.data.importers import SEQUENCES, RawFile, read_chunks
from forge_ray.data.sequences import (
    EVENTS,
    RowLosses,
    are_targets,
    events_of,
    files_of,
    losses_in,
    places_of,
)
from forge_ray.errors import DataError

TARGET = 1 << 39
ROWS = pa.table(
    {
        "history": pa.array([["a", "b"], [], None, ["c"]], pa.list_(pa.string())),
        "targets": pa.array([["x"], ["y", "z"], ["w"], []], pa.list_(pa.string())),
    }
)


def test_a_row_is_a_user_and_a_place_a_time() -> None:
    (batch,) = ROWS.to_batches()
    events = events_of(batch, first_row=5, prefix="f").to_pydict()
    assert events == {
        "user_id": ["f:5", "f:5", "f:5", "f:6", "f:6", "f:7", "f:8"],
        "item_id": ["a", "b", "x", "y", "z", "w", "c"],
        "timestamp": [0, 1, TARGET + 2, TARGET, TARGET + 1, TARGET, 0],
    }


def test_marks_tell_file_part_and_place() -> None:
    (batch,) = ROWS.to_batches()
    events = events_of(batch, first_row=1, prefix="f", file=2**23 - 1)
    times = events.column("timestamp").to_numpy()
    assert (times >= 0).all()
    assert places_of(times).tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert are_targets(times).tolist() == [False, False, True, True, True, True, False]
    assert set(files_of(times)) == {2**23 - 1}


def test_a_file_is_read_in_chunks_of_events(tmp_path: Path) -> None:
    many = pa.concat_tables([ROWS] * 700)
    pq.write_table(many, tmp_path / "part-00003-00001.parquet")
    file = RawFile(str(tmp_path / "part-00003-00001.parquet"), SEQUENCES, 0, 0)
    wanted = {name: name for name in EVENTS.names}
    chunks = list(read_chunks(file, wanted, field="interactions", chunk_rows=500))
    assert max(chunk.table.num_rows for chunk in chunks) == 500
    whole = pa.concat_tables([chunk.table for chunk in chunks])
    assert whole["user_id"].to_pylist()[-1] == f"00003-00001:{4 * 700}"
    # A user for every row that is not empty, none of them twice.
    assert len(whole) == 7 * 700
    assert len(set(whole["user_id"].to_pylist())) == 4 * 700


def test_other_columns_are_no_sequences(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["u"]}), tmp_path / "a.parquet")
    file = RawFile(str(tmp_path / "a.parquet"), SEQUENCES, 0, 0)
    with pytest.raises(DataError, match=r"interactions\.layout=events"):
        list(read_chunks(file, {"item_id": "item_id"}, field="interactions"))


def lost_from(history: str, targets: str, gone: set[str]) -> str:
    """What a row lost when some items are left out, told from the row itself."""
    kept = [[one for one in part if one not in gone] for part in (history, targets)]
    if not history or not targets:
        return "without_targets" if history else "without_history"
    if not all(kept):
        return "skipped_history" if kept[1] else "skipped_targets"
    return "fewer_targets" if len(kept[1]) < len(targets) else ""


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_rows_that_lose_items_are_counted_by_cause_in_chunks_of_any_size(chunk: int) -> None:
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefgh"))
    sizes = draw.integers(0, 4, (200, 2))
    rows = [
        tuple("".join(draw.choice(letters, size)) for size in two) for two in sizes if two.any()
    ]
    table = pa.table({"history": [list(h) for h, _ in rows], "targets": [list(t) for _, t in rows]})
    (batch,) = table.to_batches()
    events = events_of(batch, first_row=1, prefix="f", file=3)
    times = events.column("timestamp").to_numpy()
    gone = {"a", "b", "c"}
    kept = np.array([one not in gone for one in events.column("item_id").to_pylist()])
    losses = RowLosses()
    for start in range(0, len(times), chunk):
        losses.add(times[start : start + chunk], kept[start : start + chunk])
    causes = [lost_from(history, targets, gone) for history, targets in rows]
    expected = {cause: causes.count(cause) for cause in set(causes) - {""}}
    assert len(expected) == 5
    assert losses.counts() == expected
    assert RowLosses().counts() == {}


def test_losses_are_added_up_over_files() -> None:
    metric = {"fewer_targets": {"1": 2, "10": 3}, "without_history": {"0": 7}}
    found = losses_in(metric, (1, 10, 4))
    assert {cause: count for cause, count in found.items() if count} == {"fewer_targets": 5}
    assert len(found) == 5
