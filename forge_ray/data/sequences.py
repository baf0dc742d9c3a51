"""Sequences as interactions: what an AL-GR import has where other logs have one row per event.

A row of `history` and `targets` (lists of item ids, oldest first) is taken as one user, and the
place in the two lists together as the time: the files name neither. Pure Arrow and NumPy.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SEQUENCE_COLUMNS = ("history", "targets")
EVENTS = pa.schema({"user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64()})


def events_of(batch: pa.RecordBatch, *, first_row: int, prefix: str) -> pa.RecordBatch:
    """Spell rows of sequences out as events.

    Args:
        batch: columns `history` and `targets`; a null list is an empty one.
        first_row: number of the first row in its file.
        prefix: what sets the users of this file apart from those of others.

    Returns:
        Columns of `EVENTS`: users in row order, each in time order.
    """
    lists = [batch.column(name) for name in SEQUENCE_COLUMNS]
    lengths = [
        pc.fill_null(pc.list_value_length(one), 0).to_numpy(zero_copy_only=False) for one in lists
    ]
    rows = np.arange(batch.num_rows)
    owner = np.concatenate([np.repeat(rows, each) for each in lengths])
    order = np.argsort(owner, kind="stable")
    items = pa.concat_arrays([one.flatten().cast(pa.string()) for one in lists])
    total = (lengths[0] + lengths[1]).astype(np.int64)
    user = owner[order]
    time = np.arange(len(user)) - np.repeat(np.cumsum(total) - total, total)
    names = pa.array([f"{prefix}:{first_row + row}" for row in range(batch.num_rows)], pa.string())
    columns = [names.take(pa.array(user)), items.take(pa.array(order)), pa.array(time)]
    return pa.RecordBatch.from_arrays(columns, schema=EVENTS)
