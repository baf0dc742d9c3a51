"""Rows of a query set while it is made, and how users' sequences become such rows.

Pure array functions; knows nothing about files or Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forge_ray.data.hashing import hash_ids
from forge_ray.data.queries.query_set import QUERY_SCHEMA
from forge_ray.data.queries.text import folded
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import SequenceBatch, Split

_STRIDE = 1_000_003


@dataclass(frozen=True)
class Asked:
    """Moments at which users wanted an item.

    Attributes:
        user_index: int64 [R].
        items: R histories before those moments, oldest first.
        targets: int64 [R], the item.
        position: int64 [R], interactions of the user before it.
    """

    user_index: NDArray[np.int64]
    items: Ragged
    targets: NDArray[np.int64]
    position: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def keys(self) -> NDArray[np.int64]:
        """A number for each moment that does not depend on the others, int64 [R]."""
        return self.user_index * _STRIDE + self.position

    def take(self, rows: NDArray[Any]) -> Asked:
        """Select moments by index or mask."""
        index = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Asked(
            self.user_index[index],
            self.items.take(index),
            self.targets[index],
            self.position[index],
        )

    def table(self, queries: list[str]) -> pa.Table:
        """Rows of a query set, with these queries [R]."""
        targets = Ragged.from_lengths(
            self.targets.astype(np.int32), np.ones(len(self.targets), dtype=np.int64)
        )
        columns = [
            pa.array(self.user_index),
            self.items.to_arrow(),
            targets.to_arrow(),
            pa.array(queries, pa.string()),
        ]
        return pa.table(columns, schema=QUERY_SCHEMA)


def asked_in_training(users: SequenceBatch, *, max_history: int) -> Asked:
    """Every interaction of the train part, after at most `max_history` items before it."""
    items = users.items
    position = items.positions
    lengths = np.minimum(position, max_history)
    starts = np.arange(len(items.values), dtype=np.int64) - lengths
    return Asked(
        users.user_index[items.row_ids],
        items.slices(starts, lengths),
        items.values.astype(np.int64),
        position,
    )


def asked_when_held_out(users: SequenceBatch) -> Asked:
    """Every held-out item, after the whole history: what was seen stays out of the lists."""
    assert users.targets is not None  # held-out splits always have targets
    owner = users.targets.row_ids
    items = users.items.take(owner)
    return Asked(
        users.user_index[owner],
        items,
        users.targets.values.astype(np.int64),
        items.lengths + users.targets.positions,
    )


def pair_hashes(targets: NDArray[np.integer[Any]], queries: list[str]) -> NDArray[np.uint64]:
    """One number for each pair of item and query, `folded`, uint64 [R]."""
    pairs = zip(targets.tolist(), queries, strict=True)
    return hash_ids(np.array([f"{item} {folded(query)}" for item, query in pairs], dtype=object))


def asked_of(users: SequenceBatch, split: Split, *, max_history: int) -> Asked:
    """The moments at which users of a split wanted an item."""
    if split == "train":
        return asked_in_training(users, max_history=max_history)
    return asked_when_held_out(users)
