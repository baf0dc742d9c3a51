"""Where the tasks of a query set write, and what they say about it.

Train shards go to a scratch folder first: they are compared with the held-out queries before they
belong to the artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forge_ray.artifacts import ArtifactWriter
from forge_ray.data import tasks
from forge_ray.data.queries.rows import pair_hashes
from forge_ray.data.schema import SPLITS, Split

WRITTEN = tasks.with_ledger({"split": pa.string(), "rows": pa.int64(), "pair": pa.uint64()})
"""What comes back of a shard: one row per held-out query, one in all of train queries."""
NO_PAIRS = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Target:
    """Where shards go; sent with every task.

    Attributes:
        filesystem: of the artifact.
        root: folder of the artifact.
        scratch: folder of train shards that were not compared with the held-out ones yet.
    """

    filesystem: Any
    root: str
    scratch: str

    @classmethod
    def of(cls, writer: ArtifactWriter) -> Target:
        """The folders of an artifact that is being built; they exist afterwards."""
        for split in SPLITS:
            writer.path("sequences", split, "part")
        writer.filesystem.create_dir(f"{writer.scratch}/train", recursive=True)
        return cls(writer.filesystem, writer.root, writer.scratch)

    def write(self, split: Split, name: str, table: pa.Table) -> pa.Table:
        """Write a shard if it has rows, and say what was written."""
        where = f"{self.scratch}/train" if split == "train" else f"{self.root}/sequences/{split}"
        if table.num_rows:
            tasks.write_shard(table, f"{where}/{name}", self.filesystem)
        if split == "train":
            return written(split, 0, NO_PAIRS)
        return written(split, 1, pairs_of(table))


def written(split: str, rows: int, pairs: NDArray[np.uint64]) -> pa.Table:
    """What comes back of a shard.

    Args:
        split: of the shard.
        rows: queries that each row stands for.
        pairs: uint64 [R], hashes of held-out queries with their items.
    """
    columns = {
        "split": pa.array([split] * len(pairs), pa.string()),
        "rows": pa.array(np.full(len(pairs), rows, np.int64)),
        "pair": pa.array(pairs),
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
