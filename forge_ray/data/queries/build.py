"""From a dataset, and perhaps a query log, to a query set.

Queries follow the dataset's splits: a query that led to a validation or test target is in that
split, all others are in train. Train queries that ask for a held-out query's item in the very same
words are left out and counted (`repeats=drop`), so that no held-out pair of query and item was ever
seen. Shards are written by Ray Data tasks; Ray must be running.

Memory: a task holds one shard of users, its queries, and the texts of the items that these users
took. Texts of all items (with a log, their ids) and 8 bytes for each distinct pair of held-out
query and item lie once in the object store of a node, where all its tasks read them without a copy;
the one worker that puts texts or pairs there holds them up to three times. The driver holds counts,
an example of each cause, and the names of the shards.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray
from pyarrow import fs as pafs

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping, to_overrides
from forge_ray.data import tasks
from forge_ray.data.importers import RawFile, fingerprint, list_files
from forge_ray.data.queries.log import QueryLogConfig, logged
from forge_ray.data.queries.output import (
    WRITTEN,
    Counted,
    Target,
    collected,
    pairs_of,
    texts_of,
    written,
)
from forge_ray.data.queries.query_set import QUERIES_KIND, QuerySet
from forge_ray.data.queries.rows import Asked, asked_of
from forge_ray.data.queries.words import DeriveConfig, QueryMaker
from forge_ray.data.schema import SPLITS, Dataset, Split, sequence_batch
from forge_ray.data.sorted_arrays import is_member
from forge_ray.data.sources import absolute_path
from forge_ray.errors import ConfigError, DataError

REPEATED = "repeated_query"
WORDLESS = "no_text"
_SCHEMA_VERSION = 2
"""2: pairs of characters in scripts without spaces; equal words in another case are the same;
queries of a log are near their interactions, and of the days of their stage."""


@dataclass(kw_only=True)
class QueriesConfig:
    """A query set: where the queries come from."""

    name: str = ""
    """Name of the artifact; by default that of the dataset with `-queries`, or `-synthetic`."""
    log: QueryLogConfig = field(default_factory=QueryLogConfig)
    """Files with queries that were asked."""
    derive: DeriveConfig = field(default_factory=DeriveConfig)
    """How queries are made from the items' texts, where there is no log."""
    max_history: int = 50
    """Newest items kept before a train query; held-out queries keep the whole history."""
    repeats: Literal["drop", "keep"] = "drop"
    """What happens to train queries for the item of a held-out query in the same words, case and
    spaces aside. `keep` is how a running search meets them, and measures memory too."""

    def __post_init__(self) -> None:
        """Checks the range."""
        if self.max_history < 1:
            raise ConfigError(f"max_history must be >= 1, got {self.max_history}. Use e.g. 50.")


def build_queries(config: QueriesConfig, dataset: Dataset, store: ArtifactStore) -> QuerySet:
    """Make a query set, or find it in the store.

    Args:
        config: where the queries come from.
        dataset: whose users asked, or are made to.
        store: where the artifact goes.

    Raises:
        DataError: a row breaks a rule, or a split is left without queries.
    """
    located = replace(config, log=replace(config.log, path=absolute_path(config.log.path)))
    files = list_files(located.log.path, field="log.path") if config.log.path else []
    column = config.derive.column
    if not files and column not in dataset.item_columns():
        raise DataError(
            f"derive.column must be a column of the items of {dataset.name}, got {column!r}. "
            f"There are {', '.join(dataset.item_columns())}."
        )
    words = ["forge-ray", "data", "queries", dataset.artifact.manifest.ref]
    artifact = store.build(
        QUERIES_KIND,
        config.name or f"{dataset.name}-{'queries' if files else 'synthetic'}",
        _identity(config, files),
        parents=[dataset.key],
        produce=lambda writer: _produce(config, files, dataset, writer),
        command=shlex.join([*words, *to_overrides(located)]),
        schema_version=_SCHEMA_VERSION,
    )
    return QuerySet(artifact, dataset)


def _identity(config: QueriesConfig, files: Sequence[RawFile]) -> dict[str, Any]:
    """What decides the rows; files by what they hold, not by where they lie."""
    given = to_mapping(config)
    kept = {name: given[name] for name in ("max_history", "repeats")}
    if not files:
        return {**kept, "derive": given["derive"]}
    log = {name: one for name, one in given["log"].items() if name != "path"}
    return {**kept, "log": log, "files": [fingerprint(file) for file in files]}


def _produce(
    config: QueriesConfig, files: Sequence[RawFile], dataset: Dataset, writer: ArtifactWriter
) -> ArtifactInfo:
    target = Target.of(writer, compares=config.repeats == "drop")
    rows = (
        logged(config.log, files, dataset, target, max_history=config.max_history)
        if files
        else _derived(config, dataset, target)
    )
    held_out, counted = tasks.gathered(rows, collected)
    ledger = counted.ledger
    train = Counted(ledger=ledger)
    for table in tasks.tables(_compared(held_out, target)):
        train.add(table)
    counts: dict[str, int] = {"train": train.rows["train"]}
    counts |= {str(split): counted.rows[split] for split in SPLITS[1:]}
    if not all(counts.values()):
        raise DataError(
            f"every split must have queries, got {counts}; left out: {dict(ledger.counts)}. "
            "Give queries that led to interactions of the dataset."
        )
    return ArtifactInfo(
        rows={**counts, **ledger.counts},
        metrics={"synthetic": not files, "examples": dict(ledger.examples)},
    )


# ---- queries made from texts ----


def _derived(config: QueriesConfig, dataset: Dataset, target: Target) -> ray.data.Dataset:
    shards = [(split, path) for split in SPLITS for path in dataset.sequence_files(split)]
    return tasks.for_each(
        range(len(shards)),
        _derive_shard,
        shards=shards,
        source=dataset.filesystem,
        texts=_texts.remote(dataset, config.derive.column),
        config=config,
        target=target,
    )


@ray.remote
def _texts(dataset: Dataset, column: str) -> pa.LargeStringArray:
    """Texts of all items by item index, from a worker: the driver holds none of them."""
    tasks.limit_threads()
    found = dataset.items([column])[column]
    # More than 2 GiB of them do not fit a `string` array.
    return found.cast(pa.large_string()).combine_chunks()


def _derive_shard(
    number: int,
    *,
    shards: Sequence[tuple[Split, str]],
    source: Any,
    texts: ray.ObjectRef[pa.LargeStringArray],
    config: QueriesConfig,
    target: Target,
) -> Iterator[pa.Table]:
    split, path = shards[number]
    users = sequence_batch(pq.read_table(path, filesystem=source).combine_chunks())
    asked = asked_of(users, split, max_history=config.max_history)
    queries = _queries(asked, ray.get(texts), config.derive)
    has_words = np.array([bool(query) for query in queries], dtype=bool)
    ledger = tasks.Ledger()
    wordless = np.flatnonzero(~has_words)
    if len(wordless):
        item = int(asked.targets[wordless[0]])
        what = f"item {item}: {config.derive.column} must hold a word, got none"
        ledger.add(WORDLESS, len(wordless), what)
    kept = asked.take(has_words)
    yield target.write(split, path.rsplit("/", 1)[-1], kept.table([q for q in queries if q]))
    yield tasks.ledger_rows(WRITTEN, ledger)


def _queries(asked: Asked, texts: pa.LargeStringArray, config: DeriveConfig) -> list[str]:
    """A query for each moment; only texts of items that were wanted become Python's."""
    items, places = np.unique(asked.targets, return_inverse=True)
    maker = QueryMaker(texts.take(pa.array(items)).to_pylist(), config)
    return maker.queries(places, asked.keys)


# ---- train queries beside held-out ones ----


def _compared(held_out: ray.ObjectRef[NDArray[np.uint64]], target: Target) -> ray.data.Dataset:
    folder = f"{target.scratch}/train"
    found = target.filesystem.get_file_info(pafs.FileSelector(folder))
    files = sorted(entry.path for entry in found)
    return tasks.for_each(
        range(len(files)),
        _compare_shard,
        files=files,
        held_out=held_out,
        target=target,
    )


def _compare_shard(
    number: int,
    *,
    files: Sequence[str],
    held_out: ray.ObjectRef[NDArray[np.uint64]],
    target: Target,
) -> Iterator[pa.Table]:
    table = pq.read_table(files[number], filesystem=target.filesystem)
    repeated = np.zeros(table.num_rows, dtype=bool)
    if target.compares:
        repeated = is_member(pairs_of(table), ray.get(held_out))
    ledger = tasks.Ledger()
    if repeated.any():
        text = texts_of(table.filter(pa.array(repeated)))[0]
        example = f"a train query must not repeat a held-out one, got {text!r}"
        ledger.add(REPEATED, int(repeated.sum()), example)
    kept = table.filter(pa.array(~repeated))
    if kept.num_rows:
        name = files[number].rsplit("/", 1)[-1]
        tasks.write_shard(kept, f"{target.root}/sequences/train/{name}", target.filesystem)
    yield written("train", kept.num_rows)
    yield tasks.ledger_rows(WRITTEN, ledger)
