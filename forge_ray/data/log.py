"""From users' files to the ordered log: an artifact that all splits are cut from.

The log holds the catalogue with its dense item index, the vectors under that index, and every
user's interactions in time order, users placed in shards by a hash of their id. Changing the split
does not read the raw files again. No process ever holds more than one shard of the log; the item
ids lie in the object store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping
from forge_ray.data import tasks
from forge_ray.data.al_gr.folder import import_above
from forge_ray.data.catalogue import (
    Inputs,
    index_items,
    require_attributes,
    write_items,
    write_vectors,
)
from forge_ray.data.checks import (
    Screen,
    TimeUnit,
    as_ids,
    as_timestamps,
    is_empty,
)
from forge_ray.data.hashing import hash_ids
from forge_ray.data.importers import (
    SEQUENCES,
    RawFile,
    fingerprint,
    list_files,
    read_chunks,
    require_columns,
)
from forge_ray.data.item_index import DROPPED, UNKNOWN, ItemIndex, to_bytes, to_strings
from forge_ray.data.published import sequence_shards
from forge_ray.data.ragged import Ragged
from forge_ray.data.sequences import ROW_LOSSES, SEQUENCE_FILES, RowLosses
from forge_ray.data.sources import SourcesConfig, event_columns
from forge_ray.errors import DataError

KIND = "log"
UNSORTED = "unsorted_timestamp"
SKIPPED_WITH_ITEM = "interaction_of_skipped_item"
"""No cause of its own: the item's counts already."""
SHARD_BYTES = 32 * 2**20
MIN_SHARDS = 8
MAX_SHARDS = 4096
TICKS_PER_DAY: dict[TimeUnit, int] = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "day": 1}

# Exchanged between all workers, so every byte of a row counts: `place` is file and row in one
# number, and ledger rows are spelled out as the users of shard -1.
_EVENTS = pa.schema(
    {
        "shard": pa.int32(),
        "user_id": pa.string(),
        "item": pa.int32(),
        "timestamp": pa.int64(),
        "place": pa.int64(),
    }
)
_ROW_BITS = 40
LOG_SCHEMA = pa.schema(
    {"user_id": pa.string(), "items": pa.list_(pa.int32()), "timestamps": pa.list_(pa.int64())}
)
_SHARD_STATS = tasks.with_ledger(
    {
        "shard": pa.int32(),
        "users": pa.int64(),
        "events": pa.int64(),
        "first": pa.int64(),
        "last": pa.int64(),
    }
)


def find_inputs(config: SourcesConfig) -> Inputs:
    """Find all raw files and check that the mapped columns exist.

    Args:
        config: with every path resolved.

    Raises:
        DataError: a path leads nowhere, a folder has no shards, a column is missing.
    """
    events = list_files(config.interactions.path, field="interactions.path")
    names: tuple[str, ...] = ()
    if config.interactions.layout == "sequences":
        found = sequence_shards(config.interactions.path, events)
        events, names = list(found.shards), found.names
    inputs = Inputs(
        interactions=tuple(events),
        sequence_files=names,
        items=tuple(list_files(config.items.path, field="items.path") if config.items.path else ()),
        vectors={
            space: tuple(list_files(source.path, field=f"vectors.{space}.path"))
            for space, source in config.vectors.items()
        },
    )
    for file in inputs.interactions:
        require_columns(file, event_columns(config), field="interactions")
    if config.items.required and not inputs.items:
        raise DataError(
            f"items.required must go with a catalogue, got {config.items.required} and no items. "
            "Set items.path, or leave items.required out."
        )
    for file in inputs.items:
        require_columns(file, {"item_id": config.items.item_id}, field="items")
        require_attributes(file, config.items)
    for space, files in inputs.vectors.items():
        source = config.vectors[space]
        for file in files:
            wanted = {"item_id": source.item_id, "vector": source.vector}
            require_columns(file, wanted, field=f"vectors.{space}")
    return inputs


def build_log(
    config: SourcesConfig,
    store: ArtifactStore,
    *,
    name: str,
    num_shards: int = 0,
    command: str = "",
) -> Artifact:
    """Return the ordered log of these inputs, building it unless the store has it.

    Args:
        config: with every path resolved.
        store: where it goes.
        name: name of the artifact.
        num_shards: shards of the log; 0 makes one per 32 MiB of raw interactions, at least 8.
        command: shell command that repeats the preparation, for the manifest.

    Raises:
        DataError: the input breaks a rule; names file, row or column.
    """
    inputs = find_inputs(config)
    shards = _num_shards(inputs, num_shards)
    return store.build(
        KIND,
        name,
        _identity(config, inputs, shards),
        produce=lambda writer: _write_log(config, inputs, shards, writer),
        command=command,
    )


def find_log(
    config: SourcesConfig, store: ArtifactStore, *, num_shards: int = 0
) -> Artifact | None:
    """The log that `build_log` would return at once, or None where it would build one."""
    inputs = find_inputs(config)
    identity = _identity(config, inputs, _num_shards(inputs, num_shards))
    return store.find(KIND, ArtifactStore.key(KIND, identity))


def _num_shards(inputs: Inputs, num_shards: int) -> int:
    size = sum(file.size_bytes for file in inputs.interactions)
    return num_shards or min(max(MIN_SHARDS, -(-size // SHARD_BYTES)), MAX_SHARDS)


def al_gr_version(config: SourcesConfig) -> str:
    """Which of FORGE's two sets of SIDs the inputs belong to; empty where they are not FORGE's.

    Raises:
        DataError: they belong to both, or to an import that was interrupted.
    """
    vectors = [one.path for one in config.vectors.values()]
    paths = [one for one in (config.interactions.path, config.items.path, *vectors) if one]
    imports = {path: one for path in paths if (one := import_above(path)) is not None}
    found = {one.finished()[0].version: path for path, one in imports.items()}
    if len(found) > 1:
        raise DataError(
            f"inputs must be of one version of AL-GR, got {found}. SIDs of one version mean "
            "nothing to the items of the other: take all files from one import."
        )
    return next(iter(found), "")


def _identity(config: SourcesConfig, inputs: Inputs, shards: int) -> dict[str, Any]:
    """What decides the content: settings and file contents, but not where the files lie."""
    plain = to_mapping(config)
    if version := al_gr_version(config):
        plain["al_gr_version"] = version
    plain.pop("source")
    if inputs.sequence_files:
        plain[SEQUENCE_FILES] = list(inputs.sequence_files)
        plain["sequence_origins"] = [file.origin for file in inputs.interactions]
    if plain["interactions"]["layout"] == "events":
        del plain["interactions"]["layout"]  # as before there was a choice
    if not plain["items"]["required"]:
        del plain["items"]["required"]
    sections = [plain["interactions"], plain["items"], *plain["vectors"].values()]
    groups = [inputs.interactions, inputs.items, *(inputs.vectors[s] for s in plain["vectors"])]
    for section, files in zip(sections, groups, strict=True):
        section.pop("path")
        with ThreadPoolExecutor(8) as pool:
            section["files"] = list(pool.map(fingerprint, files))
    return {**plain, "skip": sorted(config.skip), "num_shards": shards}


def _write_log(
    config: SourcesConfig, inputs: Inputs, shards: int, writer: ArtifactWriter
) -> ArtifactInfo:
    catalogue = index_items(config, inputs)
    write_items(config, inputs, catalogue, writer)
    dims = write_vectors(config, inputs, catalogue, writer)
    output = tasks.Output.below(writer, "log")
    stats = order_events(config, inputs, catalogue.shared, shards=shards, output=output)
    ledger = catalogue.ledger
    rows = tasks.split_ledger(stats, ledger)
    losses = pop_losses(ledger)
    if not rows.num_rows:
        raise DataError(
            f"{config.interactions.path} must hold at least one usable interaction, got none "
            f"(left out: {dict(ledger.counts)}). Check the file, or shorten `skip`."
        )
    users = np.zeros(shards, dtype=np.int64)
    users[rows["shard"].to_numpy()] = rows["users"].to_numpy()
    reordered = ledger.counts.pop(UNSORTED, 0)
    skipped = {f"skipped_{cause}": count for cause, count in sorted(ledger.counts.items())}
    return ArtifactInfo(
        rows={
            "items": catalogue.num_items,
            "users": int(users.sum()),
            "interactions": int(rows["events"].to_numpy().sum()),
            "reordered_interactions": reordered,
            **skipped,
        },
        metrics={
            "users_per_shard": users.tolist(),
            "first_timestamp": int(rows["first"].to_numpy().min()),
            "last_timestamp": int(rows["last"].to_numpy().max()),
            "ticks_per_day": TICKS_PER_DAY[config.interactions.timestamp_unit],
            **({"al_gr_version": version} if (version := al_gr_version(config)) else {}),
            **_sequence_metrics(inputs, losses),
            **{f"vector_dim_{space}": dim for space, dim in dims.items()},
        },
    )


def _sequence_metrics(inputs: Inputs, losses: dict[str, dict[str, int]]) -> dict[str, Any]:
    if not inputs.sequence_files:
        return {}
    return {SEQUENCE_FILES: list(inputs.sequence_files), ROW_LOSSES: losses}


def order_events(
    config: SourcesConfig,
    inputs: Inputs,
    index: ray.ObjectRef[ItemIndex],
    *,
    shards: int,
    output: tasks.Output | None,
) -> pa.Table:
    """Read, check, exchange by user and order all interactions; one pass of Ray Data.

    Args:
        config: with every path resolved.
        inputs: the files.
        index: the catalogue.
        shards: number of shards to make.
        output: where to write them; None only checks.

    Returns:
        A row of statistics per shard with users, and ledger rows; see `pop_losses`.
    """
    events = tasks.for_each(
        range(len(inputs.interactions)),
        _events_of,
        files=inputs.interactions,
        wanted=event_columns(config),
        index=index,
        skip=frozenset(config.skip),
        unit=config.interactions.timestamp_unit,
        shards=shards,
    )
    ordered = tasks.exchange(
        events,
        _write_shard_of,
        shards=shards,
        files=inputs.interactions,
        must_be_sorted=config.interactions.unsorted == "error",
        output=output,
    )
    return tasks.results(ordered)


def _events_of(
    number: int,
    *,
    files: Sequence[RawFile],
    wanted: Mapping[str, str],
    index: ray.ObjectRef[ItemIndex],
    skip: frozenset[str],
    unit: TimeUnit,
    shards: int,
) -> Iterator[pa.Table]:
    items = ray.get(index)
    losses = RowLosses()
    is_sequences = files[number].format == SEQUENCES
    for chunk in read_chunks(files[number], wanted, field="interactions"):
        screen = Screen(chunk, skip)
        users, ids = as_ids(chunk, "user_id"), as_ids(chunk, "item_id")
        screen.reject("empty_user", is_empty(users), column="user_id", rule="not be empty")
        screen.reject("empty_item", is_empty(ids), column="item_id", rule="not be empty")
        times = as_timestamps(screen, "timestamp", unit)
        places = items.lookup(ids)
        screen.reject(
            "unknown_item", places == UNKNOWN, column="item_id", rule="be in the catalogue"
        )
        is_dropped = screen.keep & (places == DROPPED)
        screen.ledger.add(SKIPPED_WITH_ITEM, int(is_dropped.sum()), "")
        keep = screen.keep & ~is_dropped
        users = users.filter(pa.array(keep))
        columns = {
            "shard": shard_of(users, shards),
            "user_id": users,
            "item": places[keep],
            "timestamp": times[keep],
            "place": (number << _ROW_BITS) + chunk.first_row + np.flatnonzero(keep),
        }
        yield pa.table(columns, schema=_EVENTS)
        yield _spelled(screen.ledger)
        if is_sequences:
            losses.add(times, keep)
    yield _spelled(_as_ledger(losses, files[number].origin))


def _as_ledger(losses: RowLosses, file: int) -> tasks.Ledger:
    """Counts of rows, to travel with the rows left out; `pop_losses` takes them out again."""
    ledger = tasks.Ledger()
    for cause, count in losses.counts().items():
        ledger.add(f"{ROW_LOSSES}/{cause}/{file}", count, "")
    return ledger


def pop_losses(ledger: tasks.Ledger) -> dict[str, dict[str, int]]:
    """Take out of a ledger what rows of sequences lost: the metric `sequences.ROW_LOSSES`."""
    found: dict[str, dict[str, int]] = {}
    for name in [one for one in ledger.counts if one.startswith(f"{ROW_LOSSES}/")]:
        _, cause, file = name.split("/")
        found.setdefault(cause, {})[file] = ledger.counts.pop(name)
    return {cause: dict(sorted(found[cause].items())) for cause in sorted(found)}


def _spelled(ledger: tasks.Ledger) -> pa.Table:
    """Ledger rows that the exchange brings together as shard -1."""
    rows = [
        json.dumps([cause, count, ledger.examples[cause]]) for cause, count in ledger.counts.items()
    ]
    nothing = np.zeros(len(rows), dtype=np.int64)
    columns = [nothing - 1, pa.array(rows, pa.string()), nothing, nothing, nothing]
    arrays = [pa.array(one).cast(to.type) for one, to in zip(columns, _EVENTS, strict=True)]
    return pa.table(arrays, schema=_EVENTS)


def _ledger_of(rows: pa.Table) -> tasks.Ledger:
    """Undo `_spelled`."""
    ledger = tasks.Ledger()
    for text in rows["user_id"].to_pylist():
        ledger.add(*json.loads(text))
    return ledger


def unit_of(ticks_per_day: int) -> TimeUnit:
    """The unit of a log's times."""
    units: dict[int, TimeUnit] = {ticks: unit for unit, ticks in TICKS_PER_DAY.items()}
    return units[ticks_per_day]


def shard_of(users: pa.Array, shards: int) -> NDArray[np.int32]:
    """Return the shard of each user id ``[n]`` int32, by a hash of the id."""
    encoded = users.dictionary_encode()
    places = (hash_ids(encoded.dictionary) % np.uint64(shards)).astype(np.int32)
    return np.asarray(places[encoded.indices.to_numpy()])


def _write_shard_of(
    table: pa.Table,
    *,
    files: Sequence[RawFile],
    must_be_sorted: bool,
    output: tasks.Output | None,
) -> pa.Table:
    """Order the events of one shard and write it; one row of statistics comes back."""
    shard = table["shard"][0].as_py()
    if shard < 0:
        return tasks.ledger_rows(_SHARD_STATS, _ledger_of(table))
    encoded = table["user_id"].combine_chunks().dictionary_encode()
    ids, rank = np.unique(to_bytes(encoded.dictionary), return_inverse=True)
    user = rank[encoded.indices.to_numpy()]
    time = table["timestamp"].to_numpy()
    place = table["place"].to_numpy()
    order = np.lexsort((place, user))
    found = _unsorted(table, order, user, files)
    if must_be_sorted and found.counts:
        raise DataError(
            f"{found.examples[UNSORTED]} ({found.counts[UNSORTED]} such rows in this shard). Sort "
            "the log, or set interactions.unsorted=sort to order it here."
        )
    if found.counts:
        # Ties in time keep the order of the files: many logs have day resolution.
        order = np.lexsort((place, time, user))
    lengths = np.bincount(user, minlength=len(ids))
    if output is not None:
        columns = [
            to_strings(ids),
            Ragged.from_lengths(table["item"].to_numpy()[order], lengths).to_arrow(),
            Ragged.from_lengths(time[order], lengths).to_arrow(),
        ]
        output.write(pa.table(columns, schema=LOG_SCHEMA), shard)
    stats = {
        "shard": pa.array([shard], pa.int32()),
        "users": [len(ids)],
        "events": [len(user)],
        "first": [int(time.min())],
        "last": [int(time.max())],
    }
    ours = tasks.data_rows(_SHARD_STATS, stats)
    return pa.concat_tables([ours, tasks.ledger_rows(_SHARD_STATS, found)])


def _unsorted(
    table: pa.Table, order: NDArray[np.int64], user: NDArray[np.int64], files: Sequence[RawFile]
) -> tasks.Ledger:
    """Count the rows whose time is before that of the row before, by user in file order."""
    found = tasks.Ledger()
    time = table["timestamp"].to_numpy()[order]
    falls = (np.diff(time) < 0) & (np.diff(user[order]) == 0)
    if not falls.any():
        return found
    after = int(np.argmax(falls)) + 1
    event = table.slice(int(order[after]), 1).to_pylist()[0]
    file, row = divmod(event["place"], 1 << _ROW_BITS)
    message = (
        f"{files[file].uri} row {row}: timestamp must not fall within a user's "
        f"rows, got {event['timestamp']} after {time[after - 1]} for user {event['user_id']!r}"
    )
    found.add(UNSORTED, int(falls.sum()), message)
    return found
