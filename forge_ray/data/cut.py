"""Cutting one dataset artifact out of the ordered log, one log shard per task.

Knows the layout of both artifacts. Which events go where is decided in `splits`, which pairs exist
in `pairs`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from pyarrow import fs as pafs

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactWriter
from forge_ray.data import tasks
from forge_ray.data.hashing import hash_ids, mix64
from forge_ray.data.pairs import PairsConfig, write_pairs
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import (
    HELD_OUT_SCHEMA,
    PAIRS_SCHEMA,
    SPLITS,
    TRAIN_SCHEMA,
    USERS_SCHEMA,
)
from forge_ray.data.sequences import ROW_LOSSES, SEQUENCE_FILES, losses_in
from forge_ray.data.splits import (
    PublishedConfig,
    PublishedStage,
    SplitConfig,
    SplitPart,
    Splits,
    StageDays,
    TemporalConfig,
    leave_one_out,
    places,
    published,
    temporal,
)
from forge_ray.errors import DataError

# A row with an item counts its train events; one with a split counts that split's users.
_STATS = pa.schema({"split": pa.string(), "item": pa.int32(), "count": pa.int64()})


@dataclass(frozen=True, slots=True)
class Stage:
    """One dataset to cut.

    Attributes:
        number: from 1.
        days: if the split is temporal.
        files: if the split is published.
    """

    number: int
    days: StageDays | None = None
    files: PublishedStage | None = None

    def __str__(self) -> str:
        if self.days is not None:
            return f" of stage {self.number} ({self.days})"
        return "" if self.files is None else f" of stage {self.number}"


@dataclass(frozen=True, slots=True)
class _Cut:
    """What every task of one cut needs.

    Attributes:
        files: log shards, in order.
        first_users: ``[shards]`` user index of the first user of each shard.
        is_sequences: whether the log's times are marks (`sequences.events_of`).
        source: filesystem of the log.
        target: filesystem of the dataset.
        root: folder of the dataset.
    """

    split: SplitConfig
    stage: Stage
    ticks_per_day: int
    files: Sequence[str]
    first_users: Sequence[int]
    is_sequences: bool
    source: Any
    target: Any
    root: str


def write_dataset(
    split: SplitConfig, pairs: PairsConfig, *, log: Artifact, stage: Stage, writer: ArtifactWriter
) -> ArtifactInfo:
    """Write all parts of a dataset.

    Raises:
        DataError: the split leaves no user for training or for a held-out part.
    """
    num_users, counts = _counted(_cut_all(split, log, stage, writer), log.manifest.rows["items"])
    _require_users(num_users, stage)
    _write_items(log, counts, writer)
    _copy_vectors(log, writer)
    num_pairs = _write_pairs(pairs, counts, writer, shards=len(log.files("log")))
    return ArtifactInfo(
        rows={
            **log.manifest.rows,
            **{f"{name}_users": count for name, count in num_users.items()},
            "train_interactions": int(counts.sum()),
            "pairs": num_pairs,
            **_held_out_losses(log, stage),
        },
        metrics={
            name: log.manifest.metrics[name]
            for name in ("ticks_per_day", "al_gr_version")
            if name in log.manifest.metrics
        },
    )


def _held_out_losses(log: Artifact, stage: Stage) -> dict[str, int]:
    """Published held-out rows that are in no part, or lack targets; a log made before has none."""
    if stage.files is None or ROW_LOSSES not in log.manifest.metrics:
        return {}
    files = (*stage.files.validation, *stage.files.test)
    found = losses_in(log.manifest.metrics[ROW_LOSSES], files)
    return {f"held_out_{cause}": count for cause, count in found.items()}


def _counted(stats: Iterator[pa.Table], num_items: int) -> tuple[dict[str, int], NDArray[np.int32]]:
    """Users by split, and train events by item ``[N]``; a table is added up and let go at a time.

    All tables together have a row per item and shard, which grows with the log.
    """
    num_users, counts = dict.fromkeys(SPLITS, 0), np.zeros(num_items, dtype=np.int32)
    for table in stats:
        rows = table.filter(table["split"].is_null())
        # Items are distinct within a table of a shard, but a batch may hold several.
        np.add.at(counts, rows["item"].to_numpy(), rows["count"].to_numpy().astype(np.int32))
        for row in table.filter(table["split"].is_valid()).to_pylist():
            num_users[row["split"]] += row["count"]
    return {str(name): count for name, count in num_users.items()}, counts


def _cut_all(
    split: SplitConfig, log: Artifact, stage: Stage, writer: ArtifactWriter
) -> Iterator[pa.Table]:
    for part in (*(("sequences", name) for name in SPLITS), ("users",)):
        writer.path(*part, "part")
    sizes = np.array(log.manifest.metrics["users_per_shard"], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    files = log.files("log")
    # Shards without users have no file.
    cut = _Cut(
        split=split,
        stage=stage,
        ticks_per_day=log.manifest.metrics["ticks_per_day"],
        files=files,
        first_users=starts[sizes > 0].tolist(),
        is_sequences=SEQUENCE_FILES in log.manifest.metrics,
        source=log.filesystem,
        target=writer.filesystem,
        root=writer.root,
    )
    return tasks.tables(tasks.for_each(range(len(files)), _cut_shard, cut=cut))


def _cut_shard(number: int, *, cut: _Cut) -> Iterator[pa.Table]:
    table = _shuffled(pq.read_table(cut.files[number], filesystem=cut.source))
    index = np.arange(table.num_rows, dtype=np.int64) + cut.first_users[number]
    users = pa.table([index, table["user_id"]], schema=USERS_SCHEMA)
    tasks.write_shard(users, f"{cut.root}/users/part-{number:05d}.parquet", cut.target)
    splits = _apply(cut, table)
    for name in SPLITS:
        part: SplitPart = getattr(splits, name)
        if len(part.rows):
            schema = TRAIN_SCHEMA if name == "train" else HELD_OUT_SCHEMA
            columns = [index[part.rows], part.items.to_arrow(), part.following.to_arrow()]
            path = f"{cut.root}/sequences/{name}/part-{number:05d}.parquet"
            tasks.write_shard(pa.table(columns, schema=schema), path, cut.target)
        yield pa.table([[name], [None], [len(np.unique(part.rows))]], schema=_STATS)
    items, counts = np.unique(splits.train.items.values, return_counts=True)
    yield pa.table([pa.nulls(len(items), pa.string()), items, counts], schema=_STATS)


def _shuffled(table: pa.Table) -> pa.Table:
    """Users in an order that their ids fix but do not show: the first n are a random sample."""
    hashes = hash_ids(table["user_id"])
    # Remixed: some bits of the hash chose the shard, others choose between held-out parts.
    return table.take(np.argsort(hashes * np.uint64(0x9E3779B97F4A7C15), kind="stable"))


def _apply(cut: _Cut, table: pa.Table) -> Splits:
    items, times = Ragged.from_arrow(table["items"]), Ragged.from_arrow(table["timestamps"])
    hashes = hash_ids(table["user_id"])
    # The low bits chose the shard; the high ones are independent of it.
    draw = (hashes >> np.uint64(32)).astype(np.float64) / 2.0**32
    if isinstance(cut.split, PublishedConfig):
        assert cut.stage.files is not None
        goes = draw < cut.split.validation_share
        return published(items, times, stage=cut.stage.files, is_validation=goes)
    if not isinstance(cut.split, TemporalConfig):
        return leave_one_out(items, places(times) if cut.is_sequences else times)
    assert cut.stage.days is not None
    splits = temporal(
        items,
        times,
        days=cut.stage.days,
        ticks_per_day=cut.ticks_per_day,
        is_validation=draw < cut.split.validation_share,
        targets=cut.split.targets,
    )
    if cut.split.targets != "each":
        return splits
    return Splits(
        splits.train, _scattered(splits.validation, hashes), _scattered(splits.test, hashes)
    )


def _scattered(part: SplitPart, hashes: NDArray[np.uint64]) -> SplitPart:
    """Rows of a user apart from each other, so that the first n are a random sample of rows."""
    order = np.argsort(mix64(hashes[part.rows] + part.items.lengths.astype(np.uint64)))
    return SplitPart(part.rows[order], part.items.take(order), part.following.take(order))


def _require_users(num_users: dict[str, int], stage: Stage) -> None:
    for name, count in num_users.items():
        if not count:
            raise DataError(
                f"split {name}{stage} must have at least one user, got {num_users}. "
                "Give a longer log; with a temporal split, more stage_days or test_days; with a "
                "published one, test files with more histories, or another validation_share."
            )


# ---- what does not depend on users ----


def _write_items(log: Artifact, counts: NDArray[np.int32], writer: ArtifactWriter) -> None:
    files = log.files("items")
    dataset = tasks.for_each(
        range(len(files)),
        _count_items_of,
        files=files,
        source=log.filesystem,
        counts=ray.put(counts),
        folder=writer.path("items", "part").removesuffix("/part"),
        target=writer.filesystem,
    )
    tasks.results(dataset)


def _count_items_of(
    number: int,
    *,
    files: Sequence[str],
    source: Any,
    counts: ray.ObjectRef[NDArray[np.int32]],
    folder: str,
    target: Any,
) -> Iterator[pa.Table]:
    table = pq.read_table(files[number], filesystem=source)
    column = pa.array(ray.get(counts)[table["item_index"].to_numpy()].astype(np.int64))
    table = table.add_column(2, "train_count", column)
    tasks.write_shard(table, f"{folder}/{files[number].rsplit('/', 1)[-1]}", target)
    yield pa.table({"number": [number]})


def _copy_vectors(log: Artifact, writer: ArtifactWriter) -> None:
    """Repeat the log's vectors; on one local disk as links, which cost no space."""
    for path in log.files("vectors"):
        target = writer.path(*path.removeprefix(f"{log.path()}").strip("/").split("/"))
        if isinstance(log.filesystem, pafs.LocalFileSystem):
            _link_or_copy(path, target)
        else:
            pafs.copy_files(
                path,
                target,
                source_filesystem=log.filesystem,
                destination_filesystem=writer.filesystem,
            )


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another device, or a filesystem without links
        shutil.copyfile(source, target)


def _write_pairs(
    config: PairsConfig, counts: NDArray[np.int32], writer: ArtifactWriter, *, shards: int
) -> int:
    folder = writer.path("pairs", "part").removesuffix("/part")
    train = writer.path("sequences", "train", "part").removesuffix("/part")
    entries = writer.filesystem.get_file_info(pafs.FileSelector(train))
    written = write_pairs(
        config,
        sorted(entry.path for entry in entries),
        counts,
        folder=folder,
        filesystem=writer.filesystem,
        shards=shards,
    )
    if not written:
        empty = PAIRS_SCHEMA.empty_table()
        tasks.write_shard(empty, f"{folder}/part-00000.parquet", writer.filesystem)
    return written
