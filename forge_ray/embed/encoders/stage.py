"""Encoding a catalogue: Ray Data actors, one shard of vectors per slice of the items table.

Publishes an artifact of kind `vectors` that `vectors.space` can name. A finished shard is kept in
the build's scratch folder with the rows it rejected, so a killed stage continues with the shards
that are missing. Memory: one slice of items and its vectors per actor; nothing grows with N but the
list of slices. A Ray must be up when the catalogue is larger than `local_items`.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from pyarrow.fs import FileSystem

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping, to_overrides
from forge_ray.data import tasks
from forge_ray.data.schema import Dataset, vectors_schema
from forge_ray.embed.encoders.base import EMPTY, Encoded, EncoderConfig, require_columns
from forge_ray.embed.encoders.model import ModelFolder, find_model
from forge_ray.embed.vectors import KIND
from forge_ray.errors import ConfigError, DataError
from forge_ray.leases import list_entries
from forge_ray.threads import set_threads

logger = logging.getLogger(__name__)

EncodeReport = Callable[[int, int], None]
"""Called with the items encoded so far and their number."""
_SPREAD = (
    *("batch_size", "shard_rows", "local_items", "max_actors", "cpus_per_actor", "gpus_per_actor"),
    "missing",
)
_REJECTED = b"rejected"
_NAMED = 5


def ignore_report(done: int, total: int) -> None:
    """Drop the progress; the default of `encode_items`."""


@dataclass(frozen=True)
class Slice:
    """Some consecutive rows of one row group of the items table."""

    path: str
    row_group: int
    start: int
    rows: int

    def read(self, filesystem: FileSystem, columns: Sequence[str]) -> pa.Table:
        """Load `item_index`, `item_id` and the columns."""
        wanted = list(dict.fromkeys(["item_index", "item_id", *columns]))
        with filesystem.open_input_file(self.path) as handle:
            group = pq.ParquetFile(handle).read_row_group(self.row_group, columns=wanted)
        return group.slice(self.start, self.rows)


def encode_items(
    config: EncoderConfig,
    dataset: Dataset,
    store: ArtifactStore,
    *,
    report: EncodeReport = ignore_report,
) -> Artifact:
    """Open the vectors of this configuration, encoding the catalogue if they are not in the store.

    Args:
        config: kind, model and columns.
        dataset: only its items are read.
        store: where the artifact of kind `vectors` is kept.
        report: called as shards are finished.

    Returns:
        The artifact: `vectors/`, and `rejected/` when items could not be encoded.

    Raises:
        ConfigError: a column, the model or a library is absent, or the name is taken.
        DataError: items cannot be encoded and `missing` is `fail`.
    """
    if config.space in dataset.spaces:
        raise ConfigError(
            f"name must differ from the spaces of {dataset.name!r}, got {config.space!r}. "
            "Choose another --name."
        )
    require_columns(
        config.columns, pq.read_schema(_items(dataset)[0], filesystem=dataset.filesystem)
    )
    model = find_model(config.model, revision=config.revision)
    config = replace(config.absolute(), model=model.source, revision=model.revision)
    artifact = store.build(
        KIND,
        config.space,
        _identity(config, model),
        parents=(dataset.key,),
        produce=lambda writer: _produce(config, model, dataset, writer, report),
        command=_command(config, dataset),
    )
    rejected = artifact.manifest.metrics["rejected"]
    if rejected and config.missing == "fail":
        raise _refusal(config, rejected, list(artifact.manifest.metrics["rejected_first"]))
    return artifact


def _identity(config: EncoderConfig, model: ModelFolder) -> dict[str, Any]:
    """What decides the vectors; how the work is spread changes them by rounding at most."""
    mapping = {name: one for name, one in to_mapping(config).items() if name not in _SPREAD}
    return {**mapping, "name": config.space, "fingerprint": model.fingerprint}


def _command(config: EncoderConfig, dataset: Dataset) -> str:
    words = ["forge-ray", "embed", config.kind, dataset.artifact.uri]
    return shlex.join(words + [one for one in to_overrides(config) if not one.startswith("kind=")])


def _items(dataset: Dataset) -> list[str]:
    return dataset.artifact.files("items/")


def _produce(
    config: EncoderConfig,
    model: ModelFolder,
    dataset: Dataset,
    writer: ArtifactWriter,
    report: EncodeReport,
) -> ArtifactInfo:
    started = time.monotonic()
    slices = plan_slices(dataset, config.shard_rows)
    if config.missing == "fail":
        _look_before(config, dataset, slices)
    parts = _Parts(writer.filesystem, writer.scratch, config.storage)
    finished = parts.finished(slices)
    pending = [one for one in slices if parts.name(one) not in finished]
    logger.info("encoding %d shards of %s, %d are there", len(slices), dataset.name, len(finished))
    if pending:
        done = dataset.num_items - sum(one.rows for one in pending)
        is_local = dataset.num_items <= config.local_items
        encode = _encode_here if is_local else _encode_on_ray
        for rows in encode(config, model, dataset, parts, pending):
            done += rows
            report(done, dataset.num_items)
    rejected = pa.concat_tables([parts.rejected(one) for one in slices])
    counts = _count(rejected)
    first = rejected["item_id"].slice(0, _NAMED).to_pylist()
    if counts and config.missing == "fail":
        raise _refusal(config, counts, first)
    parts.move_to(writer, slices)
    if len(rejected):
        with writer.open("rejected", "part-00000.parquet") as stream:
            pq.write_table(rejected, stream)
    return ArtifactInfo(
        rows={"items": dataset.num_items, "rejected": len(rejected)},
        metrics={
            "rejected": counts,
            "rejected_first": first,
            "shards": len(slices),
            "shards_resumed": len(finished),
            "seconds": round(time.monotonic() - started, 3),
        },
    )


def plan_slices(dataset: Dataset, shard_rows: int) -> list[Slice]:
    """Cut the items table into slices of at most `shard_rows` rows; only footers are read."""
    found = []
    for path in _items(dataset):
        with dataset.filesystem.open_input_file(path) as handle:
            footer = pq.ParquetFile(handle).metadata
        for group in range(footer.num_row_groups):
            rows = footer.row_group(group).num_rows
            found += [
                Slice(path, group, start, min(shard_rows, rows - start))
                for start in range(0, rows, shard_rows)
            ]
    return found


def _look_before(config: EncoderConfig, dataset: Dataset, slices: Sequence[Slice]) -> None:
    """Refuse empty rows before the model is loaded, where looking is cheap."""
    count, first = 0, list[str]()
    for one in slices:
        items = one.read(dataset.filesystem, config.columns)
        is_empty = config.is_empty(items)
        if is_empty is None:
            return
        count += int(is_empty.sum())
        if len(first) < _NAMED:
            first += items["item_id"].filter(pa.array(is_empty)).to_pylist()
    if count:
        raise _refusal(config, {EMPTY: count}, first[:_NAMED])


def _refusal(config: EncoderConfig, counts: dict[str, int], first: Sequence[str]) -> DataError:
    causes = ", ".join(f"{count:,} {cause}" for cause, count in counts.items())
    named = ", ".join(repr(one) for one in first)
    columns = "+".join(config.columns)
    return DataError(
        f"items.{columns} must hold {config.wanted} of every item, got items without: {causes} "
        f"(first: {named}). Complete them, or set missing=zero to give them zero vectors and list "
        "them in the artifact's rejected/."
    )


def _count(rejected: pa.Table) -> dict[str, int]:
    return dict(sorted(Counter(rejected["cause"].to_pylist()).items()))


@dataclass(frozen=True)
class _Parts:
    """The scratch folder of finished shards; each holds its rejected rows in its footer."""

    filesystem: FileSystem
    folder: str
    storage: Literal["float16", "float32"]

    def name(self, one: Slice) -> str:
        """File of a slice; says all that decides which rows it holds."""
        stem = one.path.rpartition("/")[2].removesuffix(".parquet")
        return f"{stem}-{one.row_group:05d}-{one.start:08d}-{one.rows}.parquet"

    def finished(self, slices: Sequence[Slice]) -> set[str]:
        """Names of complete files among those of the slices."""
        self.filesystem.create_dir(self.folder, recursive=True)
        there = {entry.base_name for entry in list_entries(self.filesystem, self.folder)}
        return there & {self.name(one) for one in slices}

    def write(self, one: Slice, items: pa.Table, found: Encoded) -> None:
        """Write a file that appears under its name only when complete."""
        rows = list(found.rejected)
        picked = items.select(["item_index", "item_id"]).take(pa.array(rows, pa.int64()))
        listed = picked.append_column("cause", pa.array(list(found.rejected.values()), pa.string()))
        schema = vectors_schema(found.vectors.shape[1], self.storage)
        table = pa.table(
            [items["item_index"], _lists(found.vectors, schema)],
            schema=schema.with_metadata({_REJECTED: json.dumps(listed.to_pylist())}),
        )
        partial = f"{self.folder}/.{uuid.uuid4().hex}"
        with self.filesystem.open_output_stream(partial) as stream:
            pq.write_table(table, stream)
        self.filesystem.move(partial, f"{self.folder}/{self.name(one)}")

    def rejected(self, one: Slice) -> pa.Table:
        """The rows a finished shard rejected: `item_index`, `item_id`, `cause`."""
        path = f"{self.folder}/{self.name(one)}"
        metadata = pq.read_schema(path, filesystem=self.filesystem).metadata
        rows = json.loads(metadata[_REJECTED])
        schema = pa.schema({"item_index": pa.int32(), "item_id": pa.string(), "cause": pa.string()})
        return pa.Table.from_pylist(rows, schema=schema)

    def move_to(self, writer: ArtifactWriter, slices: Sequence[Slice]) -> None:
        """Make the shards those of the artifact."""
        for number, one in enumerate(slices):
            target = writer.path("vectors", f"part-{number:05d}.parquet")
            self.filesystem.move(f"{self.folder}/{self.name(one)}", target)


def _lists(vectors: np.ndarray[Any, np.dtype[np.float32]], schema: pa.Schema) -> pa.Array:
    type_ = schema.field("vector").type
    stored = vectors.astype(np.float16 if type_.value_type == pa.float16() else np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), type=type_)


class _EncodeSlice:
    """A Ray Data actor that reads slices of items and writes their vectors."""

    def __init__(
        self, config: EncoderConfig, model: ModelFolder, dataset: Dataset, parts: _Parts
    ) -> None:
        set_threads(config.cpus_per_actor)
        self.columns = config.columns
        self.filesystem = dataset.filesystem
        self.parts = parts
        self.encoder = config.load(model)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        one = Slice(**row)
        items = one.read(self.filesystem, self.columns)
        self.parts.write(one, items, self.encoder.encode(items))
        return {"rows": one.rows}


def _encode_here(
    config: EncoderConfig,
    model: ModelFolder,
    dataset: Dataset,
    parts: _Parts,
    pending: Sequence[Slice],
) -> Iterator[int]:
    """Encode the slices in this process; yields the rows of each."""
    encoder = config.load(model)
    for one in pending:
        items = one.read(dataset.filesystem, config.columns)
        parts.write(one, items, encoder.encode(items))
        yield one.rows


def _encode_on_ray(
    config: EncoderConfig,
    model: ModelFolder,
    dataset: Dataset,
    parts: _Parts,
    pending: Sequence[Slice],
) -> Iterator[int]:
    """Encode the slices; yields the rows of some as they are finished."""
    # Actors read the items themselves: with a reading step before them, one free CPU would hold
    # either the reader or the encoder, and each would wait for the other.
    rows = ray.data.from_items(
        [vars(one) for one in pending],
        override_num_blocks=min(len(pending), tasks.MAX_BLOCKS),
    )
    encoded = rows.map(
        _EncodeSlice,
        fn_constructor_args=(config, model, dataset, parts),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=min(config.max_actors, len(pending))
        ),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )
    for table in tasks.tables(encoded):
        if table.num_rows:
            yield sum(table["rows"].to_pylist())
