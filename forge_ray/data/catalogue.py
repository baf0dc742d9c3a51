"""The catalogue: which items exist, their dense index, and their vectors under that index.

Part of building the log. The ids are sorted in one worker and lie in the object store, once a
machine; the driver holds a few bytes per item. Titles and vectors stream through workers, one
output shard per chunk read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray

from forge_ray.artifacts import ArtifactWriter
from forge_ray.data import tasks
from forge_ray.data.checks import (
    Screen,
    as_ids,
    as_matrix,
    is_empty,
)
from forge_ray.data.importers import (
    CHUNK_ROWS,
    RawFile,
    column_names,
    extra_schema,
    read_chunks,
)
from forge_ray.data.item_index import (
    DROPPED,
    UNKNOWN,
    ItemIndex,
    distinct,
    to_bytes,
    to_strings,
)
from forge_ray.data.schema import vectors_schema
from forge_ray.data.sources import ItemsConfig, SourcesConfig, VectorsConfig, event_columns
from forge_ray.errors import DataError

_IDS = tasks.with_ledger(
    {"id": pa.string(), "file": pa.int32(), "row": pa.int64(), "is_usable": pa.bool_()}
)
_WRITTEN = tasks.with_ledger({"index": pa.int32(), "is_usable": pa.bool_()})
RESERVED = ("item_index", "item_id", "train_count")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of every raw input, found once.

    Attributes:
        interactions: shards of the log.
        items: shards of the catalogue; empty when it is implied by the log.
        vectors: shards by vector space.
        sequence_files: names of the files that `interactions` are from, where they are sequences.
    """

    interactions: tuple[RawFile, ...]
    items: tuple[RawFile, ...]
    vectors: Mapping[str, tuple[RawFile, ...]]
    sequence_files: tuple[str, ...] = ()


@dataclass(slots=True)
class Catalogue:
    """What later steps need to know of the items.

    Attributes:
        shared: ids to dense indices, in the object store.
        num_items: how many there are.
        duplicates: row numbers of repeated items to pass over, by file ordinal.
        ledger: rows left out so far.
    """

    shared: ray.ObjectRef[ItemIndex]
    num_items: int
    duplicates: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    ledger: tasks.Ledger = field(default_factory=tasks.Ledger)

    @property
    def ids(self) -> NDArray[np.bytes_]:
        """Sorted ids ``[N]``, read in place: what is not looked at takes no memory here."""
        index: ItemIndex = ray.get(self.shared)
        return index.ids


def index_items(config: SourcesConfig, inputs: Inputs) -> Catalogue:
    """Collect the item ids and give each its place among the sorted ones.

    Raises:
        DataError: an id is empty or double, or the catalogue is empty.
    """
    catalogue = _listed(config, inputs) if inputs.items else _implied(config, inputs)
    return _drop_without_vector(catalogue, config, inputs)


def _listed(config: SourcesConfig, inputs: Inputs) -> Catalogue:
    """The items that the files of the catalogue list."""
    dataset = tasks.for_each(
        range(len(inputs.items)),
        _read_ids,
        files=inputs.items,
        wanted={"item_id": config.items.item_id},
        required=config.items.required,
        skip=frozenset(config.skip),
    )
    index, found = tasks.gathered(dataset, _index, files=inputs.items, skip=config.skip)
    return Catalogue(index, found.num_items, found.duplicates, found.ledger)


def _implied(config: SourcesConfig, inputs: Inputs) -> Catalogue:
    """The items that occur in the interactions; bad rows are counted later."""
    dataset = tasks.for_each(
        range(len(inputs.interactions)),
        _read_distinct_ids,
        files=inputs.interactions,
        wanted={"item_id": event_columns(config)["item_id"]},
    )
    index, found = tasks.gathered(dataset, _distinct, where=inputs.interactions[0].uri)
    return Catalogue(index, found.num_items)


@dataclass(frozen=True, slots=True)
class _Found:
    """What comes back to the driver beside the index."""

    num_items: int
    duplicates: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    ledger: tasks.Ledger = field(default_factory=tasks.Ledger)


def _distinct(tables: Iterator[pa.Table], *, where: str) -> tuple[ItemIndex, _Found]:
    ids = np.sort(to_bytes(distinct(part for one in tables for part in one["id"].chunks)))
    if not len(ids):
        raise DataError(f"{where} must hold at least one item id, got none. Add rows to it.")
    return ItemIndex(ids), _Found(len(ids))


def _read_distinct_ids(
    number: int, *, files: Sequence[RawFile], wanted: Mapping[str, str]
) -> Iterator[pa.Table]:
    chunks = read_chunks(files[number], wanted, field="interactions")
    ids = (as_ids(chunk, "item_id") for chunk in chunks)
    yield pa.table({"id": distinct(one.filter(pa.array(~is_empty(one))) for one in ids)})


def require_attributes(file: RawFile, config: ItemsConfig) -> None:
    """Check that a file of the catalogue has the columns of `items.required`.

    Raises:
        DataError: it lacks one, or one is an id; lists those there are.
    """
    names = column_names(file) if config.required else []
    for name in config.required:
        if name in ("item_id", config.item_id):
            raise DataError(
                f"items.required must name columns beside the id, got {name!r}. Leave it out: "
                "items without an id are never taken."
            )
        if name not in names:
            raise DataError(
                f"items.required must name columns of {file.uri}, got {name!r}; it has {names}. "
                "Correct the name."
            )


def _read_ids(
    number: int,
    *,
    files: Sequence[RawFile],
    wanted: Mapping[str, str],
    required: Sequence[str],
    skip: frozenset[str],
) -> Iterator[pa.Table]:
    columns = {**wanted, **{name: name for name in required}}
    for chunk in read_chunks(files[number], columns, field="items"):
        screen = Screen(chunk, skip)
        ids = as_ids(chunk, "item_id")
        screen.reject("empty_item", is_empty(ids), column="item_id", rule="not be empty")
        # Items that lack something are listed all the same: what refers to them must be known.
        listed, rows = screen.keep.copy(), screen.rows
        for name in required:
            bad = _lacks_value(chunk.table[name])
            screen.reject("missing_attribute", bad, column=name, rule="have a value")
        yield tasks.data_rows(
            _IDS,
            {
                "id": ids.filter(pa.array(listed)),
                "file": np.full(len(rows), number, dtype=np.int32),
                "row": rows,
                "is_usable": screen.keep[listed],
            },
        )
        yield tasks.ledger_rows(_IDS, screen.ledger)


def _lacks_value(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Mark values that are null, or text that is empty."""
    missing = column.is_null()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        missing = pc.or_(missing, pc.fill_null(pc.equal(column, ""), False))
    return np.asarray(missing.to_numpy())


def _index(
    tables: Iterator[pa.Table], *, files: Sequence[RawFile], skip: Sequence[str]
) -> tuple[ItemIndex, _Found]:
    """Sort the ids that all files list, and find the repeated ones."""
    ledger = tasks.Ledger()
    parts = [part for one in tables if (part := tasks.split_ledger(one, ledger)).num_rows]
    if not parts:
        where = files[0].uri
        raise DataError(f"{where} must list at least one item, got none. Add rows to it.")
    listed = np.concatenate([to_bytes(part["id"].combine_chunks()) for part in parts])
    file = np.concatenate([part["file"].to_numpy() for part in parts])
    row = np.concatenate([part["row"].to_numpy() for part in parts])
    usable = np.concatenate([part["is_usable"].to_numpy() for part in parts])
    order = np.lexsort((row, file))
    ids, first = np.unique(listed[order], return_index=True)
    usable = usable[order][first]
    index = ItemIndex(ids[usable], ids[~usable])
    if not len(index):
        raise DataError(
            f"{files[0].uri} must list at least one usable item, got {len(ids)} that lack a value "
            "of items.required. Correct the file, or items.required."
        )
    if len(ids) == len(order):
        return index, _Found(len(index), ledger=ledger)
    is_repeat = np.ones(len(order), dtype=bool)
    is_repeat[first] = False
    repeats = order[is_repeat]
    again = repeats[0]
    name = listed[again]
    other = order[first[np.searchsorted(ids, name)]]
    broken = (
        f"{files[file[again]].uri} row {row[again]}: item_id must be unique, got "
        f"{name.decode()!r}, which row {row[other]} of {files[file[other]].uri} holds already"
    )
    if "duplicate_item" not in skip:
        raise DataError(
            f"{broken} ({len(repeats)} repeated ids). Remove the repeats, or add duplicate_item "
            "to `skip` to keep the first of each."
        )
    duplicates = {int(f): row[repeats][file[repeats] == f] for f in set(file[repeats])}
    ledger.add("duplicate_item", len(repeats), broken)
    return index, _Found(len(index), duplicates, ledger)


def _drop_without_vector(catalogue: Catalogue, config: SourcesConfig, inputs: Inputs) -> Catalogue:
    """Leave items out that lack a usable vector in some space, when that is asked for."""
    if not inputs.vectors or not {"missing_vector", "null_vector"} & set(config.skip):
        return catalogue
    drop = np.zeros(catalogue.num_items, dtype=bool)
    for space, files in inputs.vectors.items():
        found = _vector_pass(space, config, files, catalogue, output=None)
        if "missing_vector" in config.skip:
            drop |= (found.seen == 0) & (found.nulls == 0)
        if "null_vector" in config.skip:
            drop |= (found.seen == 0) & (found.nulls > 0)
        if drop.all():
            raise _no_vector_left(space, files, catalogue, found)
    ids = catalogue.ids
    if drop.any():
        example = f"item_id must have a usable vector, got none of {ids[drop][0].decode()!r}"
        catalogue.ledger.add("items_without_vector", int(drop.sum()), example)
    dropped = np.union1d(ray.get(catalogue.shared).dropped, ids[drop])
    catalogue.shared = ray.put(ItemIndex(ids[~drop], dropped))
    catalogue.num_items = int((~drop).sum())
    return catalogue


def _no_vector_left(
    space: str, files: Sequence[RawFile], catalogue: Catalogue, found: _Seen
) -> DataError:
    more = found.ledger.examples.get("unknown_vector", "")
    return DataError(
        f"vectors.{space} must hold a usable vector of some item, got none for all "
        f"{catalogue.num_items} (the first {catalogue.ids[0].decode()!r}; left out: "
        f"{dict(found.ledger.counts)}{more and f', such as {more}'}). Check that the ids of "
        f"{files[0].uri} are those of the items, or list the spaces to take under `vectors`."
    )


# ---- items ----


def write_items(
    config: SourcesConfig, inputs: Inputs, catalogue: Catalogue, writer: ArtifactWriter
) -> None:
    """Write `items/` (`item_index`, `item_id`, then what came along), one shard per chunk read."""
    output = tasks.Output.below(writer, "items")
    if not inputs.items:
        tasks.results(
            tasks.for_each(range(1), _write_implied, index=catalogue.shared, output=output)
        )
        return
    extra = extra_schema(inputs.items, exclude=[config.items.item_id, *RESERVED])
    dataset = tasks.for_each(
        range(len(inputs.items)),
        _write_items_of,
        files=inputs.items,
        wanted={"item_id": config.items.item_id},
        extra=extra,
        index=catalogue.shared,
        duplicates=catalogue.duplicates,
        output=output,
    )
    tasks.results(dataset)


def _write_implied(
    number: int, *, index: ray.ObjectRef[ItemIndex], output: tasks.Output
) -> Iterator[pa.Table]:
    ids = ray.get(index).ids
    places = np.arange(len(ids), dtype=np.int32)
    output.write(pa.table({"item_index": places, "item_id": to_strings(ids)}), number)
    yield pa.table({"number": [number]})


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
    """Usable and unusable vectors of each item ``[N]``, up to 255, and the rows left out."""

    seen: NDArray[np.uint8]
    nulls: NDArray[np.uint8]
    ledger: tasks.Ledger


def _count(counts: NDArray[np.uint8], index: NDArray[np.int32]) -> None:
    items, times = np.unique(index, return_counts=True)
    counts[items] = np.minimum(counts[items] + times, 255)


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
        _require_single(space, files, catalogue, found.seen)
        _require_every(space, files, catalogue, found.seen)
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
    _require_single(space, files, catalogue, found.seen)
    missing = (found.seen == 0) & (found.nulls == 0)
    if missing.any():
        first = catalogue.ids[int(np.argmax(missing))].decode()
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
        index=catalogue.shared,
        chunk_rows=max(1, min(CHUNK_ROWS, -(-catalogue.num_items // 8))),
        output=output,
    )
    items = catalogue.num_items
    found = _Seen(np.zeros(items, dtype=np.uint8), np.zeros(items, dtype=np.uint8), tasks.Ledger())
    for table in tasks.tables(dataset):
        rows = tasks.split_ledger(table, found.ledger)
        if rows.num_rows:
            index, usable = rows["index"].to_numpy(), rows["is_usable"].to_numpy()
            _count(found.seen, index[usable])
            _count(found.nulls, index[~usable])
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
    space: str, files: Sequence[RawFile], catalogue: Catalogue, seen: NDArray[np.uint8]
) -> None:
    if (seen > 1).any():
        rule = "hold one vector per item"
        raise DataError(
            _vector_count(space, files, catalogue, seen, seen > 1, rule) + "Remove repeats."
        )


def _require_every(
    space: str, files: Sequence[RawFile], catalogue: Catalogue, seen: NDArray[np.uint8]
) -> None:
    if (seen == 0).any():
        place = _vector_count(
            space, files, catalogue, seen, seen == 0, "hold a vector of every item"
        )
        raise DataError(
            f"{place}Add the vectors, or add missing_vector to `skip` to leave such items out."
        )


def _vector_count(
    space: str,
    files: Sequence[RawFile],
    catalogue: Catalogue,
    seen: NDArray[np.uint8],
    bad: NDArray[np.bool_],
    rule: str,
) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    first = int(np.argmax(bad))
    return (
        f"{files[0].uri}{more} (vectors.{space}) must {rule}, got {seen[first]} of item "
        f"{catalogue.ids[first].decode()!r} ({int(bad.sum())} such items of {len(seen)}). "
    )
