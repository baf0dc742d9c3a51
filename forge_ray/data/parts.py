"""Ranges of rows of shards: the units in which users are worked on.

A part is small enough to hold and to repeat; only the row groups that contain it are read. Knows
the layout of a dataset; knows nothing about what is done with the users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.data.schema import SequenceBatch, Split, Users, sequence_batch

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


@dataclass(frozen=True)
class Part:
    """Rows ``start .. start + rows`` of a shard."""

    number: int
    """Of the shard, in file order."""
    shard: str
    """Path of the shard in the dataset's filesystem."""
    start: int
    rows: int

    @property
    def name(self) -> str:
        """A word that sorts like the parts of the split."""
        return f"part-{self.number:05d}-{self.start:010d}"


def plan_parts(
    users: Users, split: Split, *, rows_per_part: int, limit: int | None = None
) -> Iterator[Part]:
    """Cut every shard of a split into parts; reads footers only, up to the limit.

    Args:
        users: a prepared dataset, or a query set.
        split: which part of it.
        rows_per_part: most users of a part.
        limit: stop after this many users, which are a fixed random sample; None takes all.
    """
    return cut_shards(
        users.sequence_files(split), users.filesystem, rows_per_part=rows_per_part, limit=limit
    )


def cut_shards(
    shards: Iterable[str], filesystem: FileSystem, *, rows_per_part: int, limit: int | None = None
) -> Iterator[Part]:
    """Cut shards into parts; reads footers only, up to the limit.

    Args:
        shards: paths of Parquet files.
        filesystem: of the paths.
        rows_per_part: most rows of a part.
        limit: stop after this many rows; None takes all.
    """
    left = limit
    for number, shard in enumerate(shards):
        if left == 0:
            return
        rows = pq.read_metadata(shard, filesystem=filesystem).num_rows
        rows = rows if left is None else min(rows, left)
        left = None if left is None else left - rows
        for start in range(0, rows, rows_per_part):
            yield Part(number, shard, start, min(rows_per_part, rows - start))


def read_part(users: Users, part: Part) -> SequenceBatch:
    """Read the users of a part, and no row group without them."""
    return sequence_batch(read_rows(users.filesystem, part))


def read_rows(filesystem: FileSystem, part: Part) -> pa.Table:
    """Read the rows of a part but their times, in one chunk, and no row group without them."""
    stop = part.start + part.rows
    with filesystem.open_input_file(part.shard) as handle:
        file = pq.ParquetFile(handle)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = np.cumsum(counts)
        starts = ends - counts
        groups = np.flatnonzero((starts < stop) & (ends > part.start))
        columns = [name for name in file.schema_arrow.names if name != "timestamps"]
        table = file.read_row_groups(groups.tolist(), columns=columns)
    first = part.start - int(starts[groups[0]])
    return table.slice(first, part.rows).combine_chunks()
