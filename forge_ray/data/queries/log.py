"""Query logs: from files with queries to the rows of a query set.

A query belongs to the interaction that it led to: the same user took the same item, the occurrence
nearest in time where times are given, within a bound. Its history is what the user had taken
before, its split that of the interaction. Queries without a user have no history; a hash of their
words places them, so that equal words, in whatever case and spacing, never stand on both sides of a
split. Of a stage, only queries of its days are read, and those of the held-out days never train.

Files are read in chunks and brought to the users' shards in two exchanges; no process holds more
than one shard of queries, and the ids of all items lie once in the object store of a node. Ray must
be running.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray

from forge_ray.artifacts import Manifest
from forge_ray.data import tasks
from forge_ray.data.checks import (
    Screen,
    TimeUnit,
    as_ids,
    as_timestamps,
    is_empty,
)
from forge_ray.data.hashing import hash_ids
from forge_ray.data.importers import RawFile, column_names, read_chunks
from forge_ray.data.item_index import UNKNOWN, ItemIndex, to_bytes
from forge_ray.data.log import shard_of, unit_of
from forge_ray.data.queries.matching import FAR, NEVER, NO_TIME, Reach, Taken, match_queries
from forge_ray.data.queries.output import WRITTEN, Target
from forge_ray.data.queries.rows import Asked, asked_of, pair_hashes
from forge_ray.data.queries.text import folded
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import SPLITS, Dataset, Split, sequence_batch
from forge_ray.errors import ConfigError, DataError

SKIPPABLE = {
    "empty_query": "rows without words",
    "empty_item": "rows without an item id",
    "unknown_item": "rows with an item that the catalogue lacks",
    "unknown_user": "rows of a user that the dataset lacks",
    "invalid_timestamp": "rows whose timestamp is missing or no whole number",
    "negative_timestamp": "rows before time 0",
    "unmatched_query": "rows of a user who never took the item",
    "distant_query": "rows further than `log.max_days` from every time the user took the item, or "
    "of the held-out days for an item taken before",
}
OUTSIDE = "outside_days"
"""Cause of rows whose time is of none of the days that the dataset was cut out of. No mistake: a
log serves many stages."""
LATER = "later_query"
"""Cause of rows without a user whose words belong to train, but which are of the held-out days."""


@dataclass(kw_only=True)
class QueryLogConfig:
    """Files with one query a row, and the names of their columns."""

    path: str = ""
    """File or folder: CSV, TSV, JSONL or Parquet. Empty: queries are made from the items' texts."""
    query: str = "query"
    """Column with the text."""
    item_id: str = "item_id"
    """Column with the item that the query led to."""
    user_id: str = "user_id"
    """Column with the user; may be absent, and empty where nobody is known."""
    timestamp: str = "timestamp"
    """Column with the time, in the unit of the interactions; may be absent. Without it nothing is
    known to be too late for a stage, and the last time a user took the item is meant."""
    max_days: float | None = 1.0
    """Most days between a query and the interaction it led to; null for any number, as where the
    interactions' times are only an order. A search and what came of it are minutes apart; a day
    allows for clocks and time zones."""
    skip: list[str] = field(default_factory=list)
    """Bad rows to leave out and count instead of failing, by cause (`log.SKIPPABLE`)."""
    held_out_share: float = 0.1
    """Share of queries without a user in each of validation and test."""

    def __post_init__(self) -> None:
        """Checks the causes and the ranges."""
        unknown = sorted(set(self.skip) - set(SKIPPABLE))
        if unknown:
            raise ConfigError(
                f"log.skip must name causes among {sorted(SKIPPABLE)}, got {unknown}. Correct the "
                "name."
            )
        if self.max_days is not None and not self.max_days >= 0.0:
            raise ConfigError(
                f"log.max_days must be >= 0 or null, got {self.max_days}. Use e.g. 1."
            )
        if not 0.0 < self.held_out_share < 0.5:
            raise ConfigError(
                f"log.held_out_share must be in (0, 0.5), got {self.held_out_share}. Use e.g. 0.1."
            )


_ASKED = tasks.with_ledger(
    {
        "shard": pa.int32(),
        "user_id": pa.string(),
        "item": pa.int32(),
        "query": pa.string(),
        "time": pa.int64(),
        "file": pa.int32(),
        "row": pa.int64(),
        "user_index": pa.int64(),
        "number": pa.int32(),
    }
)
"""Queries under way, and (without an item) the users among which they look for theirs."""
_LEDGER = -1


@dataclass(frozen=True)
class _Job:
    """What every task needs.

    Attributes:
        config: of the log.
        files: with queries.
        users: shards of users, by number; sequence shards have the same names.
        source: filesystem of the dataset.
        sequences: path by split and name of the shard.
        num_users: of the dataset; what follows numbers queries without a user.
        max_history: newest items kept before a train query.
        unit: of the interactions' times.
        reach: which interactions a query may have led to.
        target: where shards go.
    """

    config: QueryLogConfig
    files: Sequence[RawFile]
    users: Sequence[str]
    source: Any
    sequences: Mapping[Split, Mapping[str, str]]
    num_users: int
    max_history: int
    unit: TimeUnit
    reach: Reach
    target: Target


def logged(
    config: QueryLogConfig,
    files: Sequence[RawFile],
    dataset: Dataset,
    target: Target,
    *,
    max_history: int,
) -> ray.data.Dataset:
    """Write the shards of a query log; see `forge_ray.data.queries.build`.

    Args:
        config: of the log.
        files: with queries.
        dataset: whose users asked.
        target: where shards go.
        max_history: newest items kept before a train query.

    Returns:
        What was written, and ledger rows.
    """
    job = _Job(
        config=config,
        files=files,
        users=dataset.artifact.files("users/"),
        source=dataset.filesystem,
        sequences={
            split: {_name(path): path for path in dataset.sequence_files(split)} for split in SPLITS
        },
        num_users=dataset.num_users,
        max_history=max_history,
        unit=unit_of(dataset.artifact.manifest.metrics["ticks_per_day"]),
        reach=_reach(config, dataset.artifact.manifest),
        target=target,
    )
    shards = max(1, len(job.users))
    numbers = range(len(files) + len(job.users))
    rows = tasks.for_each(numbers, _read, job=job, index=_index.remote(dataset), shards=shards)
    owned = tasks.exchange(rows, _find_users, shards=shards, job=job)
    return tasks.exchange(owned, _write, shards=shards, job=job)


def _reach(config: QueryLogConfig, manifest: Manifest) -> Reach:
    ticks, stage = manifest.metrics["ticks_per_day"], manifest.config["stage"]
    most = None if config.max_days is None else config.max_days * ticks
    # Published stages have files, and numbers in the place of days.
    if stage is None or "files" in stage:
        return Reach(most)
    first, held_out, behind = (stage[name] * ticks for name in ("first", "end", "held_out_end"))
    return Reach(most, (first, held_out, behind))


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class _Items:
    """An item index whose ids need not be sorted in the dataset."""

    index: ItemIndex
    order: NDArray[np.int64]

    def lookup(self, ids: pa.Array) -> NDArray[np.int64]:
        """Item index of each id, `UNKNOWN` where there is none."""
        found = self.index.lookup(ids)
        return np.where(found == UNKNOWN, UNKNOWN, self.order[np.maximum(found, 0)])


@ray.remote
def _index(dataset: Dataset) -> _Items:
    """The item ids, from a worker: the driver holds none of them."""
    tasks.limit_threads()
    ids = dataset.items(["item_id"])["item_id"].cast(pa.string()).combine_chunks()
    return _sorted(to_bytes(ids))


def _sorted(ids: NDArray[np.bytes_]) -> _Items:
    order = np.argsort(ids, kind="stable")
    return _Items(ItemIndex(ids[order]), order)


# ---- reading ----


def _read(
    number: int, *, job: _Job, index: ray.ObjectRef[_Items], shards: int
) -> Iterator[pa.Table]:
    if number < len(job.files):
        yield from _read_queries(job, job.files[number], ray.get(index), shards)
        return
    shard = number - len(job.files)
    table = pq.read_table(job.users[shard], filesystem=job.source)
    ids = table["user_id"].combine_chunks()
    columns = {
        "shard": pa.array(shard_of(ids, shards)),
        "user_id": ids,
        "user_index": table["user_index"].combine_chunks(),
        "number": pa.array(np.full(len(ids), shard, np.int32)),
    }
    yield _rows(columns)


def _read_queries(job: _Job, file: RawFile, items: _Items, shards: int) -> Iterator[pa.Table]:
    config, names = job.config, column_names(file)
    wanted = {"query": config.query, "item_id": config.item_id}
    optional = {"user_id": config.user_id, "timestamp": config.timestamp}
    wanted |= {ours: theirs for ours, theirs in optional.items() if theirs in names}
    for chunk in read_chunks(file, wanted, field="log"):
        screen = Screen(chunk, frozenset([*config.skip, OUTSIDE]))
        texts = pc.utf8_trim_whitespace(chunk.table["query"].cast(pa.string()).combine_chunks())
        screen.reject("empty_query", is_empty(texts), column="query", rule="hold words")
        ids = as_ids(chunk, "item_id")
        screen.reject("empty_item", is_empty(ids), column="item_id", rule="not be empty")
        found = items.lookup(ids)
        screen.reject(
            "unknown_item", found == UNKNOWN, column="item_id", rule="be in the catalogue"
        )
        times = np.full(len(ids), NO_TIME, np.int64)
        if "timestamp" in wanted:
            times = as_timestamps(screen, "timestamp", job.unit)
            outside = ~job.reach.covers(times)
            rule = "be of the dataset's days"
            screen.reject(OUTSIDE, outside, column="timestamp", rule=rule)
        users = as_ids(chunk, "user_id") if "user_id" in wanted else pa.nulls(len(ids), pa.string())
        nobody = is_empty(users)
        users = pc.if_else(pa.array(nobody), pa.scalar(None, pa.string()), users)
        keep = screen.keep
        # A query of nobody is at home where the hash of its text puts it.
        homes = pc.if_else(pa.array(nobody), texts, users)
        mask = pa.array(keep)
        columns = {
            "shard": pa.array(shard_of(homes.filter(mask), shards)),
            "user_id": users.filter(mask),
            "item": pa.array(found[keep].astype(np.int32)),
            "query": texts.filter(mask),
            "time": pa.array(times[keep]),
            "file": pa.array(np.full(int(keep.sum()), file.ordinal, np.int32)),
            "row": pa.array(screen.rows.astype(np.int64)),
        }
        yield _rows(columns)
        yield _ledger(screen.ledger)


def _rows(columns: dict[str, Any]) -> pa.Table:
    count = len(columns["shard"])
    given = {
        one.name: columns.get(one.name, pa.nulls(count, one.type))
        for one in _ASKED
        if one not in tasks.LEDGER_FIELDS
    }
    return tasks.data_rows(_ASKED, given)


def _ledger(ledger: tasks.Ledger) -> pa.Table:
    """Ledger rows that the exchanges bring together as a shard of their own."""
    table = tasks.ledger_rows(_ASKED, ledger)
    return table.set_column(0, "shard", pa.array(np.full(len(table), _LEDGER, np.int32)))


# ---- users ----


def _find_users(table: pa.Table, *, job: _Job) -> pa.Table:
    """Queries with the number of their user's shard in place of the hash."""
    if table["shard"][0].as_py() == _LEDGER:
        return table
    is_query = table["item"].is_valid()
    users, asked = table.filter(pc.invert(is_query)), table.filter(is_query)
    at = pc.index_in(asked["user_id"], value_set=users["user_id"].combine_chunks())
    has_user = asked["user_id"].is_valid()
    unknown = _numpy(pc.and_(has_user, at.is_null()))
    ledger = _rejected(
        job, asked, unknown, "unknown_user", column="user_id", rule="be a user of the dataset"
    )
    kept = asked.filter(pa.array(~unknown))
    at = at.filter(pa.array(~unknown)).combine_chunks()
    numbers = pc.coalesce(users["number"].combine_chunks().take(at), kept["shard"].combine_chunks())
    same = ("user_id", "item", "query", "time", "file", "row")
    columns = {
        **{name: kept[name].combine_chunks() for name in same},
        "shard": numbers,
        "user_index": users["user_index"].combine_chunks().take(at),
    }
    return pa.concat_tables([_rows(columns), _ledger(ledger)])


def _rejected(
    job: _Job, table: pa.Table, bad: NDArray[np.bool_], cause: str, *, column: str, rule: str
) -> tasks.Ledger:
    """Fails on bad rows, or counts them where the cause may be skipped."""
    ledger = tasks.Ledger()
    if not bad.any():
        return ledger
    # The first in the files, whatever the exchange did to their order.
    in_order = table.filter(pa.array(bad)).sort_by([("file", "ascending"), ("row", "ascending")])
    row = in_order.slice(0, 1).to_pylist()[0]
    file = job.files[row["file"]].uri
    broken = f"{file} row {row['row']}: {column} must {rule}, got {row[column]!r}"
    if cause not in job.config.skip:
        raise DataError(
            f"{broken} ({int(bad.sum())} such rows in this shard). Correct the file, or add "
            f"{cause} to log.skip to leave such rows out and count them."
        )
    ledger.add(cause, int(bad.sum()), broken)
    return ledger


def _numpy(mask: Any) -> NDArray[np.bool_]:
    return np.asarray(mask.to_numpy(zero_copy_only=False) if isinstance(mask, pa.Array) else mask)


# ---- interactions ----


def _write(table: pa.Table, *, job: _Job) -> pa.Table:
    """Writes the queries of one shard of users, or passes the ledger on."""
    number = table["shard"][0].as_py()
    if number == _LEDGER:
        ledger = tasks.Ledger()
        tasks.split_ledger(table, ledger)
        return tasks.ledger_rows(WRITTEN, ledger)
    name = _name(job.users[number])
    order = [(column, "ascending") for column in ("user_index", "time", "file", "row")]
    table = table.sort_by(order).combine_chunks()
    has_user = _numpy(table["user_id"].is_valid().combine_chunks())
    known, nobody = table.filter(pa.array(has_user)), table.filter(pa.array(~has_user))
    parts = {split: _taken(job, split, name) for split in SPLITS}
    place = match_queries(
        _ints(known, "user_index"), _ints(known, "item"), _ints(known, "time"), parts, job.reach
    )
    ledger = _unmatched(job, known, place)
    texts = np.array(known["query"].to_pylist(), dtype=object)
    nobody_split = _splits_of_nobody(job, nobody, ledger)
    found, start = [], 0
    for split, part in parts.items():
        here = (place >= start) & (place < start + len(part.asked))
        asked = part.asked.take(place[here] - start).table(texts[here].tolist())
        rows = pa.concat_tables(
            [asked, _of_nobody(job, nobody.filter(pa.array(nobody_split == split)))]
        )
        found.append(job.target.write(split, name, rows))
        start += len(part.asked)
    return pa.concat_tables([*found, tasks.ledger_rows(WRITTEN, ledger)])


def _unmatched(job: _Job, table: pa.Table, place: NDArray[np.int64]) -> tasks.Ledger:
    """Fails on queries that led to nothing, or counts them where that may be skipped."""
    ledger = _rejected(
        job,
        table,
        place == NEVER,
        "unmatched_query",
        column="query",
        rule="lead to an item of its user",
    )
    rule = f"be within log.max_days={job.config.max_days} of an interaction that it may have led to"
    ledger.update(_rejected(job, table, place == FAR, "distant_query", column="time", rule=rule))
    return ledger


def _ints(table: pa.Table, column: str) -> NDArray[np.int64]:
    return np.asarray(table[column].combine_chunks().to_numpy(), dtype=np.int64)


def _taken(job: _Job, split: Split, name: str) -> Taken:
    """What one shard's users took in one split."""
    path = job.sequences[split].get(name)
    if path is None:
        return Taken.nothing()
    table = pq.read_table(path, filesystem=job.source).combine_chunks()
    asked = asked_of(sequence_batch(table), split, max_history=job.max_history)
    times = Ragged.from_arrow(table["timestamps"]).values if split == "train" else None
    return Taken(asked, times)


def _splits_of_nobody(job: _Job, table: pa.Table, ledger: tasks.Ledger) -> NDArray[Any]:
    """Split of each query without a user, by its words; none where it is too late for train."""
    texts = table["query"].to_pylist()
    hashes = hash_ids(np.array([folded(text) for text in texts], dtype=object))
    # The low bits chose the shard.
    draw = (hashes >> np.uint64(32)).astype(np.float64) / 2.0**32
    share = job.config.held_out_share
    splits = np.select([draw < share, draw < 2 * share], ["validation", "test"], "train")
    late = (splits == "train") & job.reach.is_held_out(_ints(table, "time"))
    if late.any():
        text = texts[int(np.argmax(late))]
        example = f"a train query must be of the train days, got {text!r}"
        ledger.add(LATER, int(late.sum()), example)
    return np.where(late, "", splits)


def _of_nobody(job: _Job, table: pa.Table) -> pa.Table:
    """Queries without a user as rows of a query set."""
    texts, items = table["query"].to_pylist(), _ints(table, "item")
    asked = Asked(
        # Numbers beyond the users', so that each counts as a user of its own.
        job.num_users + (pair_hashes(items, texts) >> np.uint64(2)).astype(np.int64),
        Ragged.from_lengths(np.empty(0, np.int32), np.zeros(len(items), np.int64)),
        items,
        np.zeros(len(items), np.int64),
    )
    return asked.table(texts)
