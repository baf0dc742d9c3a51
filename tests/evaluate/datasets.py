"""Dataset artifacts written directly, leave-one-out, without Ray: small inputs for metric tests."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import PAIRS_SCHEMA, Dataset, vectors_schema


def write_dataset(
    store: ArtifactStore,
    sequences: Ragged,
    *,
    item_ids: np.ndarray,
    vectors: np.ndarray | None = None,
    columns: Mapping[str, Sequence[object]] | None = None,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
    spaces: Mapping[str, np.ndarray] | None = None,
    name: str = "toy",
) -> Dataset:
    """Split every user's sequence (at least 3 items each) by leave-one-out and publish it."""
    lengths = sequences.lengths
    train = sequences.head(0) if len(sequences) == 0 else _cut(sequences, lengths - 2)
    one = np.ones(len(sequences), dtype=np.int64)
    targets = {
        "validation": Ragged.from_lengths(sequences.values[sequences.offsets[1:] - 2], one),
        "test": Ragged.from_lengths(sequences.values[sequences.offsets[1:] - 1], one),
    }
    histories = {"validation": train, "test": _cut(sequences, lengths - 1)}
    users = pa.array(np.arange(len(sequences)))
    counts = np.bincount(train.values, minlength=len(item_ids))

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        def put(columns: dict[str, object], *parts: str, schema: pa.Schema | None = None) -> None:
            table = pa.table(columns, schema=schema)
            pq.write_table(table, writer.path(*parts), filesystem=writer.filesystem)

        index = pa.array(np.arange(len(item_ids)), pa.int32())
        items = {"item_index": index, "item_id": item_ids.astype(str), "train_count": counts}
        put({**items, **(columns or {})}, "items", "part-0.parquet")
        put(
            {"user_index": users, "items": train.to_arrow(), "timestamps": train.to_arrow()},
            "sequences", "train", "part-0.parquet",
        )  # fmt: skip
        for split, history in histories.items():
            put(
                {"user_index": users, "items": history.to_arrow(),
                 "targets": targets[split].to_arrow()},
                "sequences", split, "part-0.parquet",
            )  # fmt: skip
        if pairs is not None:
            weight = np.ones(len(pairs[0]))
            put(
                {"anchor": pairs[0], "positive": pairs[1], "weight": weight},
                "pairs", "part-0.parquet",
                schema=PAIRS_SCHEMA,
            )  # fmt: skip
        given = {} if vectors is None else {"default": vectors}
        for space, rows in {**given, **(spaces or {})}.items():
            dim = rows.shape[1]
            flat = pa.array(rows.astype(np.float32).ravel())
            put(
                {"item_index": index, "vector": pa.FixedSizeListArray.from_arrays(flat, dim)},
                "vectors", space, "part-0.parquet",
                schema=vectors_schema(dim, "float32"),
            )  # fmt: skip
        return ArtifactInfo(rows={"items": len(item_ids), "users": len(sequences)})

    return Dataset(store.build("dataset", name, {"toy": name}, produce=produce))


def _cut(sequences: Ragged, lengths: np.ndarray) -> Ragged:
    return sequences.slices(sequences.offsets[:-1], lengths)


def topic_dataset(
    store: ArtifactStore,
    *,
    num_items: int = 300,
    num_users: int = 600,
    columns: Mapping[str, Sequence[object]] | None = None,
) -> Dataset:
    """Users stay inside one of ten topics; an item's vector is its topic's, plus noise."""
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(10, 8))
    vectors = topics[np.arange(num_items) % 10] + 0.2 * rng.normal(size=(num_items, 8))
    rows = rng.integers(0, num_items // 10, size=(num_users, 7)) * 10
    rows = rows + rng.integers(0, 10, size=(num_users, 1))
    sequences = Ragged.from_lists(rows, dtype=np.int32)
    ids = np.array([f"i{number:04d}" for number in range(num_items)])
    return write_dataset(store, sequences, item_ids=ids, vectors=vectors, columns=columns)


def beauty_dataset(store: ArtifactStore, folder: Path) -> Dataset:
    """Amazon Beauty, users in file order (the file is sorted by user and time)."""
    with np.load(folder / "item_embeddings_minilm384.npz", allow_pickle=False) as arrays:
        item_ids, vectors = arrays["item_id"].astype(str), arrays["embedding"]
    with (folder / "interactions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    order = np.argsort(item_ids)
    wanted = np.array([row["item_id"] for row in rows])
    items = np.searchsorted(item_ids[order], wanted).astype(np.int32)
    users = np.array([row["user_id"] for row in rows])
    _, lengths = np.unique(users, return_counts=True)
    return write_dataset(
        store,
        Ragged.from_lengths(items, lengths),
        item_ids=item_ids[order],
        vectors=vectors[order],
        name="beauty",
    )
