"""Sequences as interactions: what an AL-GR import has where other logs have one row per event.

A row of `history` and `targets` (lists of item ids, oldest first) is taken as one user. The files
name no times; the log has the place in the two lists together in their stead, and above it, which
file the row is from and whether the item is a target: so a split can tell FORGE's stages and parts
apart without reading the files again. Pure Arrow and NumPy.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SEQUENCE_COLUMNS = ("history", "targets")
EVENTS = pa.schema({"user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64()})
SEQUENCE_FILES = "sequence_files"
"""Metric of a log of sequences: names of the files that its rows are from, by number."""
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
