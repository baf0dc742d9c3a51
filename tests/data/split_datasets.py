"""Datasets cut by any split out of histories in memory: several shards, several row groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import (
    HELD_OUT_SCHEMA,
    KIND,
    SPLITS,
    TRAIN_SCHEMA,
    USERS_SCHEMA,
    Dataset,
)
from forge_ray.data.splits import SplitPart, Splits, StageDays, Targets, leave_one_out, temporal

NUM_ITEMS = 200
STAGE = StageDays(4, 10, 14)
Cut = Callable[[Ragged, Ragged], Splits]


def random_log(*, num_users: int = 60, days: int = 18) -> tuple[Ragged, Ragged]:
    """Items and days of events of every user, 1 to 14 of them, at most one a day."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 15, num_users)
    times = [np.sort(rng.permutation(days)[:size]) for size in sizes]
    items = [rng.integers(0, NUM_ITEMS, size) for size in sizes]
    return Ragged.from_lists(items, np.int32), Ragged.from_lists(times, np.int64)


def leave_one_out_cut(items: Ragged, times: Ragged) -> Splits:
    return leave_one_out(items, times)


def temporal_cut(targets: Targets) -> Cut:
    def cut(items: Ragged, times: Ragged) -> Splits:
        goes = np.arange(len(items)) % 2 == 0
        return temporal(
            items, times, days=STAGE, ticks_per_day=1, is_validation=goes, targets=targets
        )

    return cut


def split_dataset(
    store: ArtifactStore, items: Ragged, times: Ragged, cut: Cut, *, name: str, num_shards: int = 3
) -> Dataset:
    """A dataset as `data prepare` writes it; rows of `each` are mixed within a shard."""

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        catalogue = {
            "item_index": pa.array(range(NUM_ITEMS), pa.int32()),
            "item_id": [f"item-{item}" for item in range(NUM_ITEMS)],
            "train_count": pa.array(np.arange(NUM_ITEMS) % 30, pa.int64()),
        }
        _write(writer, pa.table(catalogue), "items", "part-0.parquet")
        for number, index in enumerate(np.array_split(np.arange(len(items)), num_shards)):
            shard = f"part-{number}.parquet"
            ids = pa.table([index, [f"user-{user}" for user in index]], schema=USERS_SCHEMA)
            _write(writer, ids, "users", shard)
            splits = cut(items.take(index), times.take(index))
            for split in SPLITS:
                part: SplitPart = getattr(splits, split)
                if len(part.rows):
                    rows = _table(part, index, is_train=split == "train")
                    _write(writer, rows, "sequences", split, shard)
        return ArtifactInfo(rows={"items": NUM_ITEMS, "users": len(items)})

    return Dataset(store.build(KIND, name, {"name": name}, produce=produce))


def _table(part: SplitPart, index: np.ndarray, *, is_train: bool) -> pa.Table:
    schema = TRAIN_SCHEMA if is_train else HELD_OUT_SCHEMA
    columns = [index[part.rows], part.items.to_arrow(), part.following.to_arrow()]
    table = pa.table(columns, schema=schema)
    if len(np.unique(part.rows)) < len(part.rows):
        return table.take(np.random.default_rng(1).permutation(len(table)))
    return table


def _write(writer: ArtifactWriter, table: pa.Table, *parts: str) -> None:
    pq.write_table(table, writer.path(*parts), filesystem=writer.filesystem, row_group_size=5)
