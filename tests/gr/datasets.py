"""A tiny dataset artifact, written directly: several shards, several row groups."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.data.schema import (
    DEFAULT_SPACE,
    HELD_OUT_SCHEMA,
    KIND,
    TRAIN_SCHEMA,
    USERS_SCHEMA,
    Dataset,
    vectors_schema,
)


def tiny_dataset(
    store: ArtifactStore, *, num_items: int = 200, num_users: int = 90, num_shards: int = 3
) -> Dataset:
    """Random histories of 1 to 9 items with one target each; users in contiguous shards."""

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        rng = np.random.default_rng(0)
        items = {
            "item_index": pa.array(range(num_items), pa.int32()),
            "item_id": [f"item-{i}" for i in range(num_items)],
            "train_count": pa.array(rng.integers(0, 30, num_items), pa.int64()),
        }
        _write(writer, pa.table(items), "items", "part-0.parquet")
        vectors = np.random.default_rng(1).standard_normal((num_items, 4), dtype=np.float32)
        columns = {"item_index": range(num_items), "vector": vectors.tolist()}
        rows = pa.table(columns, vectors_schema(4, "float32"))
        _write(writer, rows, "vectors", DEFAULT_SPACE, "part-0.parquet")
        for shard, users in enumerate(np.array_split(np.arange(num_users), num_shards)):
            name = f"part-{shard}.parquet"
            histories = [rng.integers(0, num_items, rng.integers(1, 10)) for _ in users]
            targets = [rng.integers(0, num_items, 1) for _ in users]
            base = {"user_index": users, "items": [h.tolist() for h in histories]}
            held_out = {**base, "targets": [t.tolist() for t in targets]}
            times = {**base, "timestamps": [list(range(len(h))) for h in histories]}
            ids = {"user_index": users, "user_id": [f"user-{u}" for u in users]}
            _write(writer, pa.table(ids, USERS_SCHEMA), "users", name)
            _write(writer, pa.table(times, TRAIN_SCHEMA), "sequences", "train", name)
            for split in ("validation", "test"):
                _write(writer, pa.table(held_out, HELD_OUT_SCHEMA), "sequences", split, name)
        return ArtifactInfo(rows={"items": num_items, "users": num_users})

    config = {"num_items": num_items, "num_users": num_users, "num_shards": num_shards}
    return Dataset(store.build(KIND, "tiny", config, produce=produce))


def _write(writer: ArtifactWriter, table: pa.Table, *parts: str) -> None:
    pq.write_table(table, writer.path(*parts), filesystem=writer.filesystem, row_group_size=7)
