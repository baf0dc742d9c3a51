"""Where the tasks of a query set write, and what they say about it.

Train shards go to a scratch folder first: they are compared with the held-out queries before they
belong to the artifact. What the driver hears of a shard is its number of rows; hashes of held-out
queries go from worker to worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forge_ray.artifacts import ArtifactWriter
from forge_ray.data import tasks
from forge_ray.data.queries.rows import pair_hashes
from forge_ray.data.schema import SPLITS, Split

WRITTEN = tasks.with_ledger(
    {"split": pa.string(), "rows": pa.int64(), "pairs": pa.list_(pa.uint64())}
)
"""What a shard was: its rows, and hashes of its held-out queries with their items."""
NO_PAIRS = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Counted:
    """What comes back to the driver of all shards.

    Attributes:
        rows: queries written by split.
        ledger: rows left out.
    """

    rows: Counter[str] = field(default_factory=Counter)
    ledger: tasks.Ledger = field(default_factory=tasks.Ledger)

    def add(self, table: pa.Table) -> pa.Table:
        """Count what a table of `WRITTEN` says; returns it without its ledger."""
        shards = tasks.split_ledger(table, self.ledger)
        if shards.num_rows:
            splits, rows = shards["split"].to_pylist(), shards["rows"].to_pylist()
            for split, count in zip(splits, rows, strict=True):
                self.rows[split] += count
        return shards


def collected(written: Iterable[pa.Table]) -> tuple[NDArray[np.uint64], Counted]:
    """The distinct hashes of all shards in ascending order, and their counts.

    Memory: 8 bytes for each hash of each shard, and as much again twice while they are sorted.

    Args:
        written: tables of `WRITTEN`.
    """
    counted, pairs = Counted(), [NO_PAIRS]
    for table in written:
        shards = counted.add(table)
        if shards.num_rows:
            pairs.append(shards["pairs"].combine_chunks().flatten().to_numpy())
    return np.unique(np.concatenate(pairs)), counted


@dataclass(frozen=True)
class Target:
    """Where shards go; sent with every task.

    Attributes:
        filesystem: of the artifact.
        root: folder of the artifact.
        scratch: folder of train shards that were not compared with the held-out ones yet.
        compares: whether they will be, so that hashes of held-out queries are wanted.
    """

    filesystem: Any
    root: str
    scratch: str
    compares: bool = True

    @classmethod
    def of(cls, writer: ArtifactWriter, *, compares: bool = True) -> Target:
        """The folders of an artifact that is being built; they exist afterwards."""
        for split in SPLITS:
            writer.path("sequences", split, "part")
        writer.filesystem.create_dir(f"{writer.scratch}/train", recursive=True)
        return cls(writer.filesystem, writer.root, writer.scratch, compares)

    def write(self, split: Split, name: str, table: pa.Table) -> pa.Table:
        """Write a shard if it has rows, and say what was written."""
        where = f"{self.scratch}/train" if split == "train" else f"{self.root}/sequences/{split}"
        if table.num_rows:
            tasks.write_shard(table, f"{where}/{name}", self.filesystem)
        if split == "train":
            return written(split, 0)  # counted when they are compared
        pairs = np.unique(pairs_of(table)) if self.compares else NO_PAIRS
        return written(split, table.num_rows, pairs)


def written(split: str, rows: int, pairs: NDArray[np.uint64] = NO_PAIRS) -> pa.Table:
    """What is said of a shard.

    Args:
        split: of the shard.
        rows: its queries.
        pairs: uint64 [P], hashes of held-out queries with their items.
    """
    offsets = pa.array([0, len(pairs)], pa.int32())
    columns = {
        "split": pa.array([split], pa.string()),
        "rows": pa.array([rows], pa.int64()),
        "pairs": pa.ListArray.from_arrays(offsets, pa.array(pairs)),
    }
    return tasks.data_rows(WRITTEN, columns)


def pairs_of(table: pa.Table) -> NDArray[np.uint64]:
    """Hashes of the rows of a query set, each with its item, uint64 [R]."""
    if not table.num_rows:
        return NO_PAIRS
    return pair_hashes(table["targets"].combine_chunks().flatten().to_numpy(), texts_of(table))


def texts_of(table: pa.Table) -> list[str]:
    """Queries of the rows of a query set."""
    return list(table["query"].to_pylist())
