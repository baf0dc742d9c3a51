"""Every user of a dataset once, with all the events that the dataset holds of it.

A user may stand in several splits, and in several rows of one (`targets=each`). Every row, its
targets included, is a beginning of the same history in time order, so the longest is all of it.
A part is a range of users; the rows of all splits are read for it, a few at a time. Knows the
layout of a dataset; knows nothing about what is done with the users.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from forge_ray.data.parts import Part, cut_shards, read_rows
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import SPLITS, Dataset, SequenceBatch, Split, sequence_batch


def plan_everyone(
    dataset: Dataset, *, rows_per_part: int, limit: int | None = None
) -> Iterator[Part]:
    """Cut the users of a dataset into parts; reads footers only, up to the limit.

    Args:
        dataset: with users.
        rows_per_part: most users of a part.
        limit: stop after this many users, which are a fixed random sample; None takes all.
    """
    return cut_shards(
        dataset.artifact.files("users/"),
        dataset.filesystem,
        rows_per_part=rows_per_part,
        limit=limit,
    )


def read_everyone(dataset: Dataset, part: Part) -> SequenceBatch:
    """Read whole histories, as many rows at a time as the part has users.

    Args:
        dataset: with users.
        part: one of `plan_everyone`.

    Returns:
        The users of the part in index order, without targets. Users without an event in the dataset
        (the log has more days than a stage, and more files than a published one) are left out.
    """
    index = read_rows(dataset.filesystem, part)["user_index"].to_numpy()
    users, histories = np.empty(0, np.int64), Ragged.from_lists([], np.int32)
    for split in SPLITS:
        for batch in _rows_of(dataset, split, part, first=int(index[0]), last=int(index[-1])):
            rows = batch.items if batch.targets is None else batch.items.followed_by(batch.targets)
            users, histories = _longest(
                np.concatenate([users, batch.user_index]), Ragged.concatenate([histories, rows])
            )
    return SequenceBatch(users, histories, None)


def _rows_of(
    dataset: Dataset, split: Split, part: Part, *, first: int, last: int
) -> Iterator[SequenceBatch]:
    """What a split holds of the users ``first .. last`` of a part."""
    users = dataset.users_file(part.shard)
    paths = [one for one in dataset.sequence_files(split) if dataset.users_file(one) == users]
    if not paths:  # none of the shard's users are in the split
        return
    column = pc.field("user_index")
    # Parquet skips row groups of other users; in train and most held-out shards users are in order.
    scanner = pads.dataset(paths, filesystem=dataset.filesystem, format="parquet").scanner(
        columns=["user_index", "items"] + ([] if split == "train" else ["targets"]),
        filter=(column >= first) & (column <= last),
        batch_size=part.rows,
        batch_readahead=1,
        fragment_readahead=1,
    )
    for batch in scanner.to_batches():
        if batch.num_rows:
            yield sequence_batch(batch)


def _longest(users: NDArray[np.int64], rows: Ragged) -> tuple[NDArray[np.int64], Ragged]:
    """The longest row of each user, in index order."""
    order = np.lexsort((rows.lengths, users))
    is_last = np.diff(users[order], append=-1) != 0
    kept = order[is_last]
    return users[kept], rows.take(kept)
