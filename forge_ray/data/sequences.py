"""Sequences as interactions: what an AL-GR import has where other logs have one row per event.

A row of `history` and `targets` (lists of item ids, oldest first) is taken as one user. The files
name no times; the log has the place in the two lists together in their stead, and above it, which
file the row is from and whether the item is a target: so a split can tell FORGE's stages and parts
apart without reading the files again. Pure Arrow and NumPy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SEQUENCE_COLUMNS = ("history", "targets")
EVENTS = pa.schema({"user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64()})
SEQUENCE_FILES = "sequence_files"
"""Metric of a log of sequences: names of the files that its rows are from, by number."""
ROW_LOSSES = "row_losses"
"""Metric of a log of sequences: rows by what they lack (`LOSSES`) and by number of the file."""
LOSSES = {
    "without_history": "rows that have no history",
    "without_targets": "rows that have no targets",
    "skipped_targets": "rows whose targets are all left out with their items",
    "skipped_history": "rows whose history is left out with its items, some targets remaining",
    "fewer_targets": "rows that stay, with some targets left out with their items",
}
_TARGET_BIT = 39
_FILE_BIT = 40


def events_of(
    batch: pa.RecordBatch, *, first_row: int, prefix: str, file: int = 0
) -> pa.RecordBatch:
    """Spell rows of sequences out as events.

    Args:
        batch: columns `history` and `targets`; a null list is an empty one.
        first_row: number of the first row in its file.
        prefix: what sets the users of this file apart from those of others.
        file: number of the file that the rows are of, below 2^23.

    Returns:
        Columns of `EVENTS`: users in row order, each in the order of places; for times, see
        `places_of`, `are_targets` and `files_of`.
    """
    lists = [batch.column(name) for name in SEQUENCE_COLUMNS]
    lengths = [
        pc.fill_null(pc.list_value_length(one), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        for one in lists
    ]
    rows = np.arange(batch.num_rows)
    owner = np.concatenate([np.repeat(rows, each) for each in lengths])
    order = np.argsort(owner, kind="stable")
    items = pa.concat_arrays([one.flatten().cast(pa.string()) for one in lists])
    total = lengths[0] + lengths[1]
    user = owner[order]
    place = np.arange(len(user)) - np.repeat(np.cumsum(total) - total, total)
    is_target = place >= np.repeat(lengths[0], total)
    time = (file << _FILE_BIT) | (is_target.astype(np.int64) << _TARGET_BIT) | place
    names = pc.binary_join_element_wise(prefix, pa.array(first_row + rows).cast(pa.string()), ":")
    columns = [names.take(pa.array(user)), items.take(pa.array(order)), pa.array(time)]
    return pa.RecordBatch.from_arrays(columns, schema=EVENTS)


def places_of(times: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each event in its row, from 0."""
    return times & ((1 << _TARGET_BIT) - 1)


def are_targets(times: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each event is one of its row's targets."""
    return (times >> _TARGET_BIT) & 1 == 1


def files_of(times: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the file that each event is from."""
    return times >> _FILE_BIT


class RowLosses:
    """Counts rows of one file by what they lacked, or lost with the items that are left out.

    Takes events as they are read: a row may begin in one chunk and end in a later one.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._times = np.empty(0, dtype=np.int64)
        self._kept = np.empty(0, dtype=bool)

    def add(self, times: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
        """Take the next events of the file.

        Args:
            times: ``[n]`` their marks.
            kept: ``[n]`` events that go into the log.
        """
        times, kept = np.concatenate([self._times, times]), np.concatenate([self._kept, kept])
        starts = np.flatnonzero(places_of(times) == 0)
        last = int(starts[-1]) if len(starts) else 0
        self._count(times[:last], kept[:last])
        self._times, self._kept = times[last:], kept[last:]

    def counts(self) -> dict[str, int]:
        """Rows by cause, among `LOSSES`, once all events are taken; a row has one cause."""
        self._count(self._times, self._kept)
        self._times, self._kept = self._times[:0], self._kept[:0]
        return dict(self._counts)

    def _count(self, times: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
        if not len(times):
            return
        starts, is_target = np.flatnonzero(places_of(times) == 0), are_targets(times)
        masks = (~is_target, is_target, ~is_target & kept, is_target & kept)
        history, targets, history_left, targets_left = (
            np.add.reduceat(mask.astype(np.int64), starts) for mask in masks
        )
        losses = {
            "without_history": history == 0,
            "without_targets": targets == 0,
            "skipped_targets": targets_left == 0,
            "skipped_history": history_left == 0,
            "fewer_targets": targets_left < targets,
        }
        is_open = np.ones(len(starts), dtype=bool)
        for cause, mask in losses.items():
            self._counts[cause] += int((mask & is_open).sum())
            is_open &= ~mask


def losses_in(row_losses: Mapping[str, Mapping[str, int]], files: Sequence[int]) -> dict[str, int]:
    """Rows of some files by each cause of `LOSSES`, from the metric `ROW_LOSSES` of their log."""
    return {
        cause: sum(row_losses.get(cause, {}).get(str(file), 0) for file in files)
        for cause in LOSSES
    }
