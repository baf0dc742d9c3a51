"""The catalogue: which items exist, their dense index, and their vectors under that index.

Part of building the log. The driver holds the item ids (16 bytes for a 16-letter id) and one byte
per item; titles and vectors stream through workers, one output shard per chunk read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from forge_ray.artifacts import ArtifactWriter
from forge_ray.data import tasks
from forge_ray.data.checks import (
    DROPPED,
    UNKNOWN,
    ItemIndex,
    Screen,
    as_ids,
    as_matrix,
    is_empty,
    to_bytes,
    to_strings,
)
from forge_ray.data.importers import (
    CHUNK_ROWS,
    RawFile,
    extra_schema,
    read_chunks,
)
from forge_ray.data.schema import vectors_schema
from forge_ray.data.sources import SourcesConfig, VectorsConfig, event_columns
from forge_ray.errors import DataError

_IDS = tasks.with_ledger({"id": pa.string(), "file": pa.int32(), "row": pa.int64()})
_WRITTEN = tasks.with_ledger({"index": pa.int32(), "is_usable": pa.bool_()})
RESERVED = ("item_index", "item_id", "train_count")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of every raw input, found once.

    Attributes:
        interactions: shards of the log.
        items: shards of the catalogue; empty when it is implied by the log.
        vectors: shards by vector space.
    """

    interactions: tuple[RawFile, ...]
    items: tuple[RawFile, ...]
    vectors: Mapping[str, tuple[RawFile, ...]]


@dataclass(slots=True)
class Catalogue:
    """What later steps need to know of the items.

    Attributes:
        index: ids to dense indices.
        duplicates: row numbers of repeated items to pass over, by file ordinal.
        ledger: rows left out so far.
    """

    index: ItemIndex
    duplicates: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    ledger: tasks.Ledger = field(default_factory=tasks.Ledger)


def index_items(config: SourcesConfig, inputs: Inputs) -> Catalogue:
    """Collect the item ids and give each its place among the sorted ones.

    Raises:
        DataError: an id is empty or double, or the catalogue is empty.
    """
    if not inputs.items:
        catalogue = Catalogue(ItemIndex(_ids_in_log(config, inputs)))
        return _drop_without_vector(catalogue, config, inputs)
    ledger = tasks.Ledger()
    dataset = tasks.for_each(
        range(len(inputs.items)),
        _read_ids,
        files=inputs.items,
        wanted={"item_id": config.items.item_id},
        skip=frozenset(config.skip),
    )
    found = _collected(dataset, ledger)
    if not len(found.ids):
        where = inputs.items[0].uri
        raise DataError(f"{where} must list at least one item, got none. Add rows to it.")
    catalogue = _index(found, inputs.items, skip=config.skip)
    catalogue.ledger.update(ledger)
    return _drop_without_vector(catalogue, config, inputs)


def _ids_in_log(config: SourcesConfig, inputs: Inputs) -> NDArray[np.bytes_]:
    """Collect the distinct item ids of the interactions, sorted; bad rows are counted later."""
    dataset = tasks.for_each(
        range(len(inputs.interactions)),
        _read_distinct_ids,
        files=inputs.interactions,
        wanted={"item_id": event_columns(config)["item_id"]},
    )
    ids = np.empty(0, dtype="S1")
    for table in tasks.tables(dataset):
        if table.num_rows:
            ids = np.union1d(ids, to_bytes(table["id"].combine_chunks()))
    if not len(ids):
        where = inputs.interactions[0].uri
        raise DataError(f"{where} must hold at least one item id, got none. Add rows to it.")
    return ids


def _read_distinct_ids(
    number: int, *, files: Sequence[RawFile], wanted: Mapping[str, str]
) -> Iterator[pa.Table]:
    found = pa.array([], pa.string())
    for chunk in read_chunks(files[number], wanted, field="interactions"):
        ids = as_ids(chunk, "item_id")
        found = pa.concat_arrays([found, ids.filter(pa.array(~is_empty(ids)))]).unique()
    yield pa.table({"id": found})


def _read_ids(
    number: int, *, files: Sequence[RawFile], wanted: Mapping[str, str], skip: frozenset[str]
) -> Iterator[pa.Table]:
    for chunk in read_chunks(files[number], wanted, field="items"):
        screen = Screen(chunk, skip)
        ids = as_ids(chunk, "item_id")
        screen.reject("empty_item", is_empty(ids), column="item_id", rule="not be empty")
        kept = ids.filter(pa.array(screen.keep))
        file = np.full(len(kept), number, dtype=np.int32)
        yield tasks.data_rows(_IDS, {"id": kept, "file": file, "row": screen.rows})
        yield tasks.ledger_rows(_IDS, screen.ledger)


@dataclass(frozen=True, slots=True)
class _Listed:
    """Items as the files list them, ``[n]`` each, in no particular order."""

    ids: NDArray[np.bytes_]
    file: NDArray[np.int32]
    row: NDArray[np.int64]


def _collected(dataset: ray.data.Dataset, ledger: tasks.Ledger) -> _Listed:
    """Bring the ids to the driver as packed bytes, a table at a time."""
    ids, file, row = [np.empty(0, "S1")], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for table in tasks.tables(dataset):
        rows = tasks.split_ledger(table, ledger)
        if rows.num_rows:
            ids.append(to_bytes(rows["id"].combine_chunks()).copy())
            file.append(rows["file"].to_numpy().copy())
            row.append(rows["row"].to_numpy().copy())
    return _Listed(np.concatenate(ids), np.concatenate(file), np.concatenate(row))


def _index(found: _Listed, files: Sequence[RawFile], *, skip: Sequence[str]) -> Catalogue:
    file, row = found.file, found.row
    order = np.lexsort((row, file))
    ids, first = np.unique(found.ids[order], return_index=True)
    catalogue = Catalogue(ItemIndex(ids))
    if len(ids) == len(order):
        return catalogue
    is_repeat = np.ones(len(order), dtype=bool)
    is_repeat[first] = False
    repeats = order[is_repeat]
    again = repeats[0]
    name = found.ids[again].decode()
    other = order[first[np.searchsorted(ids, name.encode())]]
    broken = (
        f"{files[file[again]].uri} row {row[again]}: item_id must be unique, got {name!r}, "
        f"which row {row[other]} of {files[file[other]].uri} holds already"
    )
    if "duplicate_item" not in skip:
        raise DataError(
            f"{broken} ({len(repeats)} repeated ids). Remove the repeats, or add duplicate_item "
            "to `skip` to keep the first of each."
        )
    catalogue.duplicates = {int(f): row[repeats][file[repeats] == f] for f in set(file[repeats])}
    catalogue.ledger.add("duplicate_item", len(repeats), broken)
    return catalogue


def _drop_without_vector(catalogue: Catalogue, config: SourcesConfig, inputs: Inputs) -> Catalogue:
    """Leave items out that lack a usable vector in some space, when that is asked for."""
    if not inputs.vectors or not {"missing_vector", "null_vector"} & set(config.skip):
        return catalogue
    drop = np.zeros(len(catalogue.index), dtype=bool)
    for space, files in inputs.vectors.items():
        found = _vector_pass(space, config, files, catalogue, output=None)
        if "missing_vector" in config.skip:
            drop |= found.seen + found.nulls == 0
        if "null_vector" in config.skip:
            drop |= (found.seen == 0) & (found.nulls > 0)
    ids = catalogue.index.ids
    if drop.any():
        example = f"item_id must have a usable vector, got none of {ids[drop][0].decode()!r}"
        catalogue.ledger.add("items_without_vector", int(drop.sum()), example)
    catalogue.index = ItemIndex(ids[~drop], ids[drop])
    return catalogue


# ---- items ----


def write_items(
    config: SourcesConfig, inputs: Inputs, catalogue: Catalogue, writer: ArtifactWriter
) -> None:
    """Write `items/` (`item_index`, `item_id`, then what came along), one shard per chunk read."""
    index = catalogue.index
    if not inputs.items:
        table = pa.table(
            {"item_index": np.arange(len(index), dtype=np.int32), "item_id": to_strings(index.ids)}
        )
        tasks.write_shard(table, writer.path("items", "part-00000.parquet"), writer.filesystem)
        return
    extra = extra_schema(inputs.items, exclude=[config.items.item_id, *RESERVED])
    dataset = tasks.for_each(
        range(len(inputs.items)),
        _write_items_of,
        files=inputs.items,
        wanted={"item_id": config.items.item_id},
        extra=extra,
        index=ray.put(index),
        duplicates=catalogue.duplicates,
        output=tasks.Output.below(writer, "items"),
    )
    tasks.results(dataset)


def _write_items_of(
    number: int,
    *,
    files: Sequence[RawFile],
    wanted: Mapping[str, str],
    extra: pa.Schema,
    index: ray.ObjectRef[ItemIndex],
    duplicates: Mapping[int, NDArray[np.int64]],
    output: tasks.Output,
) -> Iterator[pa.Table]:
    items = ray.get(index)
    chunks = read_chunks(files[number], wanted, field="items", extra=extra)
    for part, chunk in enumerate(chunks):
        places = items.lookup(as_ids(chunk, "item_id"))
        rows = np.arange(len(places)) + chunk.first_row
        keep = (places >= 0) & ~np.isin(rows, duplicates.get(number, []))
        table = chunk.table.drop_columns("item_id").filter(pa.array(keep))
        ids = as_ids(chunk, "item_id").filter(pa.array(keep))
        table = table.add_column(0, "item_id", ids).add_column(
            0, "item_index", pa.array(places[keep])
        )
        if len(table):
            output.write(table.sort_by("item_index"), number, part)
    yield pa.table({"number": [number]})


# ---- vectors ----


@dataclass(frozen=True, slots=True)
class _Seen:
    """Usable and unusable vectors of each item ``[N]``, and the rows left out."""

    seen: NDArray[np.int64]
    nulls: NDArray[np.int64]
    ledger: tasks.Ledger


def write_vectors(
    config: SourcesConfig, inputs: Inputs, catalogue: Catalogue, writer: ArtifactWriter
) -> dict[str, int]:
    """Write `vectors/<space>/` for every space.

    Returns:
        The width D of each space.

    Raises:
        DataError: a vector is null, not finite, ragged, double or of an unknown item, or an item
            has none.
    """
    dims = {}
    for space, files in inputs.vectors.items():
        output = tasks.Output.below(writer, "vectors", space)
        found = _vector_pass(space, config, files, catalogue, output=output)
        catalogue.ledger.update(found.ledger)
        _require_single(space, files, catalogue.index, found.seen)
        _require_every(space, files, catalogue.index, found.seen)
        dims[space] = vector_dim(files[0], config.vectors[space], f"vectors.{space}")
    return dims


def check_vectors(
    space: str, config: SourcesConfig, inputs: Inputs, catalogue: Catalogue
) -> tasks.Ledger:
    """Check one space without writing it; items without a vector are counted as such.

    Raises:
        DataError: a vector is ragged or double.
    """
    files = inputs.vectors[space]
    found = _vector_pass(space, config, files, catalogue, output=None)
    _require_single(space, files, catalogue.index, found.seen)
    missing = found.seen + found.nulls == 0
    if missing.any():
        first = catalogue.index.ids[int(np.argmax(missing))].decode()
        example = f"{files[0].uri} (vectors.{space}) must hold a vector of every item, got 0 of "
        found.ledger.add("missing_vector", int(missing.sum()), f"{example}item {first!r}")
    return found.ledger


def _vector_pass(
    space: str,
    config: SourcesConfig,
    files: Sequence[RawFile],
    catalogue: Catalogue,
    *,
    output: tasks.Output | None,
) -> _Seen:
    """Check one space, write it if asked to, and count the vectors of every item."""
    source = config.vectors[space]
    dataset = tasks.for_each(
        range(len(files)),
        _vectors_of,
        files=files,
        wanted={"item_id": source.item_id, "vector": source.vector},
        section=f"vectors.{space}",
        dim=vector_dim(files[0], source, f"vectors.{space}"),
        skip=frozenset(config.skip),
        index=ray.put(catalogue.index),
        chunk_rows=max(1, min(CHUNK_ROWS, -(-len(catalogue.index) // 8))),
        output=output,
    )
    items = len(catalogue.index)
    found = _Seen(np.zeros(items, dtype=np.int64), np.zeros(items, dtype=np.int64), tasks.Ledger())
    for table in tasks.tables(dataset):
        rows = tasks.split_ledger(table, found.ledger)
        if rows.num_rows:
            index, usable = rows["index"].to_numpy(), rows["is_usable"].to_numpy()
            np.add.at(found.seen, index[usable], 1)
            np.add.at(found.nulls, index[~usable], 1)
    return found


def _vectors_of(
    number: int,
    *,
    files: Sequence[RawFile],
    wanted: Mapping[str, str],
    section: str,
    dim: int,
    skip: frozenset[str],
    index: ray.ObjectRef[ItemIndex],
    chunk_rows: int,
    output: tasks.Output | None,
) -> Iterator[pa.Table]:
    items = ray.get(index)
    chunks = read_chunks(files[number], wanted, field=section, chunk_rows=chunk_rows)
    for part, chunk in enumerate(chunks):
        screen = Screen(chunk, skip)
        ids = as_ids(chunk, "item_id")
        places = items.lookup(ids)
        matrix = as_matrix(screen, "vector", dim)
        nulls = places[~screen.keep & (places >= 0)]
        screen.reject("empty_item", is_empty(ids), column="item_id", rule="not be empty")
        screen.reject(
            "unknown_vector", places == UNKNOWN, column="item_id", rule="be in the catalogue"
        )
        screen.keep &= places != DROPPED
        kept = places[screen.keep]
        if output is not None and len(kept):
            output.write(_vector_table(kept, matrix[screen.keep]), number, part)
        usable = np.arange(len(kept) + len(nulls)) < len(kept)
        index_column = np.concatenate([kept, nulls])
        yield tasks.data_rows(_WRITTEN, {"index": index_column, "is_usable": usable})
        yield tasks.ledger_rows(_WRITTEN, screen.ledger)


def _vector_table(places: NDArray[np.int32], matrix: NDArray[Any]) -> pa.Table:
    schema = vectors_schema(matrix.shape[1], "float16" if matrix.dtype == np.float16 else "float32")
    order = np.argsort(places, kind="stable")
    values = pa.array(matrix[order].reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(values, type=schema.field("vector").type)
    return pa.table([pa.array(places[order]), lists], schema=schema)


def vector_dim(file: RawFile, source: VectorsConfig, section: str) -> int:
    """Return the width of the first vector of a file.

    Raises:
        DataError: the file holds no vector.
    """
    wanted = {"item_id": source.item_id, "vector": source.vector}
    for chunk in read_chunks(file, wanted, field=section, chunk_rows=1024):
        matrix = as_matrix(Screen(chunk, frozenset(["null_vector"])), "vector", None)
        if matrix.shape[1]:
            return int(matrix.shape[1])
    raise DataError(f"{file.uri} must hold at least one vector, got none. Check {source.vector!r}.")


def _require_single(
    space: str, files: Sequence[RawFile], index: ItemIndex, seen: NDArray[np.int64]
) -> None:
    if (seen > 1).any():
        rule = "hold one vector per item"
        raise DataError(
            _vector_count(space, files, index, seen, seen > 1, rule) + "Remove repeats."
        )


def _require_every(
    space: str, files: Sequence[RawFile], index: ItemIndex, seen: NDArray[np.int64]
) -> None:
    if (seen == 0).any():
        place = _vector_count(space, files, index, seen, seen == 0, "hold a vector of every item")
        raise DataError(
            f"{place}Add the vectors, or add missing_vector to `skip` to leave such items out."
        )


def _vector_count(
    space: str,
    files: Sequence[RawFile],
    index: ItemIndex,
    seen: NDArray[np.int64],
    bad: NDArray[np.bool_],
    rule: str,
) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    first = int(np.argmax(bad))
    return (
        f"{files[0].uri}{more} (vectors.{space}) must {rule}, got {seen[first]} of item "
        f"{index.ids[first].decode()!r} ({int(bad.sum())} such items of {len(seen)}). "
    )
