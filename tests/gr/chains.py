"""A dataset with something to learn: every item is followed by one of three successors."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.data.schema import HELD_OUT_SCHEMA, KIND, TRAIN_SCHEMA, Dataset
from forge_ray.sid.table import SidTable


def chain_dataset(
    store: ArtifactStore, *, num_items: int = 120, num_users: int = 600, num_shards: int = 4
) -> Dataset:
    """Walks of 4 to 14 items, split leave-one-out."""

    rng = np.random.default_rng(0)
    successors = rng.integers(num_items, size=(num_items, 3))
    walks = []
    for _ in range(num_users):
        walk = [int(rng.integers(num_items))]
        for _ in range(int(rng.integers(3, 14))):
            walk.append(int(successors[walk[-1], rng.integers(3)]))
        walks.append(walk)
    return _dataset(store, "chains", walks, num_items=num_items, num_shards=num_shards)


def swinging_dataset(store: ArtifactStore, *, num_items: int = 120) -> Dataset:
    """Users who swing between two items: whatever comes next stands in their history."""
    pairs = np.arange(num_items).reshape(-1, 2).tolist()
    walks = [(pair if user % 2 else pair[::-1]) * 4 for user in range(4) for pair in pairs]
    return _dataset(store, "swings", walks, num_items=num_items, num_shards=2)


def _dataset(
    store: ArtifactStore, name: str, walks: list[list[int]], *, num_items: int, num_shards: int
) -> Dataset:
    """Walks as users, the last item but one of each held out for validation, the last left out."""

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        seen = np.concatenate([walk[:-2] for walk in walks])
        items = {
            "item_index": pa.array(range(num_items), pa.int32()),
            "item_id": [f"item-{item}" for item in range(num_items)],
            "train_count": pa.array(np.bincount(seen, minlength=num_items)),
        }
        _write(writer, pa.table(items), "items", "part-0.parquet")
        for shard in range(num_shards):
            users = np.arange(shard, len(walks), num_shards)
            trained = [walks[user][:-2] for user in users]
            base = {"user_index": users, "items": trained}
            held_out = {**base, "targets": [[walks[user][-2]] for user in users]}
            times = {**base, "timestamps": [list(range(len(walk))) for walk in trained]}
            file = f"part-{shard}.parquet"
            _write(writer, pa.table(times, TRAIN_SCHEMA), "sequences", "train", file)
            _write(writer, pa.table(held_out, HELD_OUT_SCHEMA), "sequences", "validation", file)
        return ArtifactInfo(rows={"items": num_items, "users": len(walks)})

    config = {"num_items": num_items, "num_users": len(walks), "num_shards": num_shards}
    return Dataset(store.build(KIND, name, config, produce=produce))


def grid_table(num_items: int = 120) -> SidTable:
    """Two levels of 10 and 12 codes, every item its own SID."""
    numbers = np.arange(num_items)
    return SidTable.from_codes(np.stack([numbers // 12, numbers % 12], axis=1), (10, 12))


def _write(writer: ArtifactWriter, table: pa.Table, *parts: str) -> None:
    pq.write_table(table, writer.path(*parts), filesystem=writer.filesystem)
