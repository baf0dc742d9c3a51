"""Item-to-item pairs: which items occur near each other in the train part.

The counting kernels are in `data/cooccurrence.py`; the two Ray steps around them count per log
shard and merge per range of anchors, so that no process holds more than one shard's pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray

from forge_ray.data import tasks
from forge_ray.data.cooccurrence import PairCounts, count_pairs, merge_counts
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import PAIRS_SCHEMA
from forge_ray.errors import ConfigError

USERS_PER_BATCH = 8192
_COUNTS = pa.schema({"shard": pa.int32(), "key": pa.int64(), "count": pa.int64()})


@dataclass(kw_only=True)
class PairsConfig:
    """Which pairs to count and keep."""

    window: int = 5
    """Two items of one user make a pair when at most this many places apart; 0: no pairs."""
    top_k: int = 20
    """Partners kept per anchor, by weight, ties by smaller item index."""
    min_count: int = 1
    """Pairs seen less often than this are left out."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("window", 0), ("top_k", 1), ("min_count", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"pairs.{name} must be >= {least}, got {getattr(self, name)}. "
                    f"Use pairs.window=0 to make no pairs."
                )


def strongest(pairs: PairCounts, train_counts: NDArray[np.int32], config: PairsConfig) -> pa.Table:
    """Keep the ``top_k`` partners of each anchor.

    The weight of a pair is ``count / sqrt(train_count(anchor) * train_count(positive))``, the
    cosine of the items' occurrence vectors, which keeps popular items from being everyone's
    partner.

    Returns:
        Columns of `PAIRS_SCHEMA`, by anchor, then by falling weight.
    """
    num_items = len(train_counts)
    enough = pairs.counts >= config.min_count
    anchor, positive = np.divmod(pairs.keys[enough], num_items)
    degree = train_counts.astype(np.float64)
    weight = pairs.counts[enough] / np.sqrt(degree[anchor] * degree[positive])
    order = np.lexsort((positive, -weight, anchor))
    anchor, positive, weight = anchor[order], positive[order], weight[order]
    rank = np.arange(len(anchor)) - np.searchsorted(anchor, anchor)
    keep = rank < config.top_k
    columns = [anchor[keep].astype(np.int32), positive[keep].astype(np.int32)]
    return pa.table([*columns, weight[keep].astype(np.float32)], schema=PAIRS_SCHEMA)


def write_pairs(
    config: PairsConfig,
    train_files: Sequence[str],
    train_counts: NDArray[np.int32],
    *,
    folder: str,
    filesystem: Any,
    shards: int,
) -> int:
    """Count, merge and write the pairs of all train shards.

    Args:
        config: which pairs.
        train_files: paths of `sequences/train` shards.
        train_counts: ``[N]`` train interactions per item.
        folder: where the shards go; it exists.
        filesystem: of all these paths.
        shards: number of anchor ranges to merge in.

    Returns:
        The number of pairs kept.
    """
    if not config.window:
        return 0
    counted = tasks.for_each(
        range(len(train_files)),
        _count_shard,
        files=list(train_files),
        filesystem=filesystem,
        window=config.window,
        num_items=len(train_counts),
        shards=shards,
    )
    merged = tasks.exchange(
        counted,
        _write_range,
        shards=shards,
        config=config,
        train_counts=ray.put(train_counts),
        folder=folder,
        filesystem=filesystem,
    )
    written = tasks.results(merged)
    return int(written["pairs"].to_numpy().sum()) if written.num_rows else 0


def _count_shard(
    number: int,
    *,
    files: Sequence[str],
    filesystem: Any,
    window: int,
    num_items: int,
    shards: int,
) -> Iterator[pa.Table]:
    with filesystem.open_input_file(files[number]) as source:
        for batch in pq.ParquetFile(source).iter_batches(USERS_PER_BATCH, columns=["items"]):
            items = Ragged.from_arrow(batch.column("items"))
            pairs = count_pairs(items, window=window, num_items=num_items)
            shard = (pairs.keys // num_items) * shards // num_items
            columns = [shard.astype(np.int32), pairs.keys, pairs.counts]
            yield pa.table(columns, schema=_COUNTS)


def _write_range(
    table: pa.Table,
    *,
    config: PairsConfig,
    train_counts: ray.ObjectRef[NDArray[np.int32]],
    folder: str,
    filesystem: Any,
) -> pa.Table:
    pairs = merge_counts(table["key"].to_numpy(), table["count"].to_numpy())
    kept = strongest(pairs, ray.get(train_counts), config)
    shard = table["shard"][0].as_py()
    if len(kept):
        tasks.write_shard(kept, f"{folder}/part-{shard:05d}.parquet", filesystem)
    return pa.table({"pairs": pa.array([len(kept)], pa.int64())})
