"""Item lists for every user, or for those of a split: Ray Data actors decode parts of the shards.

A *part* is a range of rows of one shard. An actor loads the model once, then reads, decodes and
writes one part after another; no process holds more users than a part. A part's Parquet file
appears under its name only when complete, so a killed run continues with the parts that are
missing. Knows nothing about how models are trained.

Lists are in beam order; items that share a SID follow each other by train count (descending), then
item index, or with `bucket_order=dense` by how close they are to the user's newest items.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray
from pyarrow.fs import FileSelector, FileSystem

from forge_ray.artifacts import open_filesystem
from forge_ray.config import to_mapping
from forge_ray.data import tasks
from forge_ray.data.everyone import plan_everyone, read_everyone
from forge_ray.data.parts import Part, plan_parts, read_part
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import (
    DEFAULT_SPACE,
    SPLITS,
    Dataset,
    SequenceBatch,
    Users,
)
from forge_ray.errors import ConfigError
from forge_ray.gr.beam import default_widths
from forge_ray.gr.bucket_order import DenseOrder
from forge_ray.gr.buckets import ItemBuckets, RankedItems
from forge_ray.gr.decoding import DecodedUsers, SidDecoder
from forge_ray.gr.filters import allowed_items
from forge_ray.gr.source import GeneratorSource
from forge_ray.threads import set_threads

logger = logging.getLogger(__name__)

REQUEST_FILE = "request.json"
SUMMARY_FILE = "summary.json"
EVERYONE = "all"
_PARTS_FOLDER = "lists"
_STATS_KEY = b"forge_ray"


@dataclass(kw_only=True)
class RecommendConfig:
    """Who gets lists, how long, and how hard the search tries."""

    split: str | None = None
    """`all`: every user once, with all the events that the dataset holds. `train`, `validation` or
    `test`: the rows of that split, whose histories end before the events held out there. By default
    `all`, with queries `test`."""
    append_targets: bool = False
    """Whether the held-out items of the split count as known history too."""
    max_users: int = 0
    """Users who get a list, the same random ones every time; 0 means all. With `split=all`
    users without an event in the dataset count, and get none."""
    top_k: int = 100
    """Items of a list."""
    widths: list[int] | None = None
    """Beams to keep after each level; by default wide enough for `top_k`, and at the last level for
    the seen items of the longest history of a part beside it."""
    exclude_seen: bool = True
    """Whether items of the history are kept out of the list."""
    allow: str | None = None
    """Text file with one item id a line: only these items are recommended."""
    deny: str | None = None
    """Text file with one item id a line: these items are not recommended."""
    bucket_order: Literal["popularity", "dense"] = "popularity"
    """Order of items that share a SID: train count, or the inner product of the item's unit vector
    and the mean unit vector of the history that the model reads. `dense` holds all vectors in
    every process."""
    space: str = DEFAULT_SPACE
    """Vectors that `dense` compares."""
    batch_users: int = 32
    """Users per search; raise it on a GPU."""
    rows_per_part: int = 8192
    """Users of one output file, the unit that a killed run repeats."""
    num_actors: int | None = None
    """Most decoding processes; by default as many as the cluster's CPUs (or GPUs) allow, those that
    it adds meanwhile too."""
    cpus_per_actor: float = 1.0
    """CPUs, and so threads, of one process."""
    use_gpu: bool = False
    """Whether each process gets a GPU."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.split not in (None, EVERYONE, *SPLITS):
            raise ConfigError(
                f"split must be one of {[EVERYONE, *SPLITS]}, got {self.split!r}. "
                "Name an existing split, or leave it out."
            )
        for name in ("top_k", "batch_users", "rows_per_part"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}. Raise it.")
        if self.num_actors is not None and self.num_actors < 1:
            raise ConfigError(
                f"num_actors must be >= 1, got {self.num_actors}. Leave it out for the default."
            )
        if self.cpus_per_actor <= 0:
            raise ConfigError(f"cpus_per_actor must be > 0, got {self.cpus_per_actor}. Use e.g. 1.")
        if self.widths and (min(self.widths) < 1 or self.widths[-1] < self.top_k):
            raise ConfigError(
                f"widths must be >= 1 and end in at least top_k={self.top_k}, got {self.widths}. "
                "Widen the last level, or leave widths out."
            )
        if self.max_users < 0:
            raise ConfigError(
                f"max_users must be >= 0, got {self.max_users}. Use 0 for all users of the split."
            )
        if self.append_targets and self.split in ("train", EVERYONE):
            why = "has no targets" if self.split == "train" else "reads all events as it is"
            raise ConfigError(
                f"append_targets must be false for split={self.split}, got true. "
                f"That split {why}: leave it out, or use split=validation or test."
            )

    def completed(self, *, has_queries: bool) -> RecommendConfig:
        """The same with its split by name."""
        return replace(self, split=self.split or ("test" if has_queries else EVERYONE))


@dataclass(frozen=True)
class RecommendReport:
    """What a run wrote.

    Attributes:
        out: folder of the Parquet files and of `summary.json`.
        users: users with a list, all parts together.
        parts: files.
        parts_resumed: files that an earlier run had finished.
        users_per_s: users of this run by its wall time, start of the actors included.
        decode_users_per_s: users of all parts by the sum of their decoding times, per process.
        invalid_rate: share of emitted SIDs that no item owns; 0 with a prefix index.
        short_rate: share of users with fewer than top_k items.
    """

    out: str
    users: int
    parts: int
    parts_resumed: int
    users_per_s: float
    decode_users_per_s: float
    invalid_rate: float
    short_rate: float


@dataclass(frozen=True)
class _Job:
    """What an actor needs; sent once. `allowed` is bool [N], or None for all items."""

    config: RecommendConfig
    source: GeneratorSource
    dataset: Dataset
    out: str
    allowed: NDArray[np.bool_] | None
    queries: QuerySet | None = None

    @property
    def users(self) -> Users:
        """Whose rows get lists."""
        return self.queries or self.dataset

    def plan(self) -> list[Part]:
        """The units of work, in order; reads footers only."""
        rows, limit = self.config.rows_per_part, self.config.max_users or None
        if self.config.split == EVERYONE:
            return list(plan_everyone(self.dataset, rows_per_part=rows, limit=limit))
        split: Any = self.config.split
        return list(plan_parts(self.users, split, rows_per_part=rows, limit=limit))

    def read(self, part: Part) -> SequenceBatch:
        """The users of one of them."""
        if self.config.split == EVERYONE:
            return read_everyone(self.dataset, part)
        return read_part(self.users, part)


def recommend(
    source: GeneratorSource,
    dataset: Dataset,
    config: RecommendConfig,
    *,
    out: str,
    queries: QuerySet | None = None,
) -> RecommendReport:
    """Write a list of items for every user, or for those of a split; needs a running Ray.

    Args:
        source: the model.
        dataset: the dataset that the model's SID table belongs to.
        config: what to write.
        out: folder or URI for ``lists/*.parquet`` (`user_index`, `user_id`, `items`, `item_ids`,
            `scores`), with `request.json` and, at the end, `summary.json`. The same call continues
            a run that was killed.
        queries: a query set of the dataset; a list for every row of the split, with a column
            `query`.

    Raises:
        ConfigError: ``out`` holds the lists of another request, no item is allowed, or the model
            did not learn to be asked so.
        DataError: a list of items does not fit the dataset, or it has no such vectors.
    """
    started = perf_counter()
    config = config.completed(has_queries=queries is not None)
    source.prompts.check(has_queries=queries is not None)
    if "://" not in out:
        out = str(Path(out).resolve())  # actors may run in another directory
    filesystem, root = open_filesystem(out)
    if config.bucket_order == "dense":
        dataset.vector_files(config.space)  # a wrong name fails here, not in an actor
    allowed = None
    if config.allow is not None or config.deny is not None:  # else the ids are not read here
        allowed = allowed_items(_item_ids(dataset), allow=config.allow, deny=config.deny)
    if queries is not None:
        _check_queries(queries, dataset, config)
    job = _Job(config, source, dataset, out, allowed, queries)
    _check_search(source, config)
    _claim(filesystem, root, _request(job))
    parts = job.plan()
    finished = _finished(filesystem, root)
    pending = [part for part in parts if _file(part) not in finished]
    logger.info(
        "recommend: %d parts, %d finished before; writing to %s", len(parts), len(finished), out
    )
    _run(job, pending)
    stats = {part: _stats(filesystem, root, part) for part in parts}
    written = sum(stats[part]["users"] for part in pending)
    report = _report(
        list(stats.values()),
        out=out,
        parts_resumed=len(parts) - len(pending),
        users_per_s=written / (perf_counter() - started),
    )
    _write_json(filesystem, f"{root}/{SUMMARY_FILE}", asdict(report))
    if absent := sum(part.rows for part in parts) - report.users:
        logger.info("recommend: %d users have no event in the dataset, and no list", absent)
    return report


def _check_search(source: GeneratorSource, config: RecommendConfig) -> None:
    """What would fail in every actor, before the folder is taken for this request."""
    if config.widths and len(config.widths) != source.num_levels:
        raise ConfigError(
            f"widths must be {source.num_levels} integers, one per level of the model's SID "
            f"table, got {config.widths}. Leave it out for the default."
        )
    if config.use_gpu and not ray.cluster_resources().get("GPU", 0.0):
        logger.warning("no node with a GPU is up: waiting for the cluster to add one")


def _check_queries(queries: QuerySet, dataset: Dataset, config: RecommendConfig) -> None:
    queries.check_dataset(dataset)
    if config.split == EVERYONE:
        raise ConfigError(
            f"split must be one of {list(SPLITS)} with --queries, got {EVERYONE!r}. Each row of a "
            "query set is a question of its own, and users may have several: leave split out for "
            "those of test."
        )
    if config.append_targets:
        raise ConfigError(
            "append_targets must be false with --queries, got true. What a query asks for is no "
            "history of it: leave it out."
        )


def _request(job: _Job) -> dict[str, Any]:
    """What decides the bytes of the lists (resources do not)."""
    given = to_mapping(job.config)
    # Files count by what they say, not by where they lie.
    other = ("num_actors", "cpus_per_actor", "use_gpu", "batch_users", "allow", "deny")
    kept = {name: value for name, value in given.items() if name not in other}
    if not kept["max_users"]:
        del kept["max_users"]  # as before there was such a field
    if job.allowed is not None:
        kept["allowed"] = hashlib.sha256(np.packbits(job.allowed).tobytes()).hexdigest()
    if job.queries is not None:
        kept["queries"] = job.queries.key
        kept |= job.source.prompts.identity(has_queries=True)
    return {"model": job.source.key, "dataset": job.dataset.key, "config": kept}


def _claim(filesystem: FileSystem, root: str, request: dict[str, Any]) -> None:
    path = f"{root}/{REQUEST_FILE}"
    filesystem.create_dir(f"{root}/{_PARTS_FOLDER}", recursive=True)
    if not filesystem.get_file_info(path).is_file:
        _write_json(filesystem, path, request)
        return
    with filesystem.open_input_stream(path) as stream:
        found = json.loads(stream.read())
    if found != request:
        given, before = ({**one, **one.get("config", {})} for one in (request, found))
        names = {*given, *before} - {"config"}
        differs = sorted(name for name in names if given.get(name) != before.get(name))
        raise ConfigError(
            f"{path} must describe this request, got another {', '.join(differs)}. "
            "Choose another --out, or remove that folder."
        )


def _finished(filesystem: FileSystem, root: str) -> set[str]:
    """Names of complete parts; what a killed writer left half is removed."""
    finished = set()
    for entry in filesystem.get_file_info(FileSelector(f"{root}/{_PARTS_FOLDER}")):
        if entry.base_name.startswith("part-"):
            finished.add(entry.base_name)
        else:
            filesystem.delete_file(entry.path)
    return finished


def _run(job: _Job, parts: list[Part]) -> None:
    if not parts:
        return
    config = job.config
    rows = [asdict(part) for part in parts]
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _PartWriter,
        fn_constructor_args=(job,),
        batch_size=1,
        batch_format="pyarrow",
        compute=_pool(config, num_parts=len(rows)),
        num_cpus=config.cpus_per_actor,
        num_gpus=1 if config.use_gpu else 0,
    )
    done = 0
    for table in tasks.tables(written):
        done += table.num_rows
        logger.info("recommend: %d of %d parts", done, len(rows))


def _pool(config: RecommendConfig, *, num_parts: int) -> ray.data.ActorPoolStrategy:
    # Ray Data starts no more actors than the cluster has room for, and more when nodes join. A
    # bound by what it has now would last where a cluster begins with its head alone.
    most = min(num_parts, config.num_actors or num_parts)
    return ray.data.ActorPoolStrategy(min_size=1, max_size=most)


class _PartWriter:
    """A Ray Data actor: holds the model, turns parts into files."""

    def __init__(self, job: _Job) -> None:
        set_threads(job.config.cpus_per_actor)
        self._job = job
        device = "cuda" if job.config.use_gpu else "cpu"
        loaded = job.source.load(device)
        levels = loaded.table.num_levels
        self._decoder = SidDecoder(
            loaded.generator,
            loaded.table,
            widths=job.config.widths or default_widths(levels, max_k=job.config.top_k),
            max_history=loaded.max_history,
            batch_users=job.config.batch_users,
            fills=job.config.top_k if job.config.exclude_seen and not job.config.widths else 0,
            allowed=job.allowed,
            text=loaded.text,
            prompts=loaded.prompts,
            device=device,
        )
        self._buckets = ItemBuckets.build(
            self._decoder.item_rank(),
            num_sids=self._decoder.index.num_sids,
            train_counts=job.dataset.train_counts(),
        )
        self._order = None
        if job.config.bucket_order == "dense":
            vectors = job.dataset.vectors(job.config.space)
            self._order = DenseOrder.of(vectors, max_history=loaded.max_history)
        self._item_ids = _item_ids(job.dataset)
        self._filesystem, self._root = open_filesystem(job.out)

    def __call__(self, batch: pa.Table) -> pa.Table:
        parts = [Part(**row) for row in batch.to_pylist()]
        for part in parts:
            self._write(part)
        return pa.table({"name": [_file(part) for part in parts]})

    def _write(self, part: Part) -> None:
        users = self._job.read(part)
        histories = _known(users, append_targets=self._job.config.append_targets)
        decoded = self._decoder.decode(histories, users.queries)
        lists = self._buckets.expand(
            decoded.sid_rank,
            decoded.scores,
            k=self._job.config.top_k,
            seen=histories if self._job.config.exclude_seen else None,
            affinity=self._order.profiles(histories) if self._order else None,
        )
        user_ids = _user_ids(self._job.dataset, part, users)
        table = _table(users, lists, self._item_ids, user_ids)
        stats = json.dumps(_part_stats(decoded, lists)).encode()
        table = table.replace_schema_metadata({_STATS_KEY: stats})
        folder = f"{self._root}/{_PARTS_FOLDER}"
        # Written under another name and moved: a part that has its name is complete.
        partial = f"{folder}/.{_file(part)}.{uuid.uuid4().hex}"
        pq.write_table(table, partial, filesystem=self._filesystem, compression="zstd")
        self._filesystem.move(partial, f"{folder}/{_file(part)}")


def _item_ids(dataset: Dataset) -> pa.LargeStringArray:
    # More than 2 GiB of them do not fit a `string` array.
    return dataset.items(["item_id"])["item_id"].cast(pa.large_string()).combine_chunks()


def _known(users: SequenceBatch, *, append_targets: bool) -> Ragged:
    """Histories, with the held-out items behind them when those are known too."""
    if not append_targets or users.targets is None:
        return users.items
    return users.items.followed_by(users.targets)


def _user_ids(dataset: Dataset, part: Part, users: SequenceBatch) -> pa.Array:
    """The users' own ids, in row order; the range filter lets Parquet skip foreign row groups."""
    index = users.user_index
    if not len(index):
        return pa.array([], pa.string())
    column = pc.field("user_index")
    found = pads.dataset(
        dataset.users_file(part.shard), filesystem=dataset.filesystem, format="parquet"
    ).to_table(filter=(column >= int(index.min())) & (column <= int(index.max())))
    order = np.argsort(found["user_index"].to_numpy())
    known = found["user_index"].to_numpy()[order]
    slots = np.searchsorted(known, index)
    # Queries need not have a user.
    is_known = index < dataset.num_users
    rows = np.where(is_known, order[np.minimum(slots, len(order) - 1)], 0) if len(order) else slots
    return found["user_id"].combine_chunks().take(pa.array(rows, mask=~is_known))


def _table(
    users: SequenceBatch, lists: RankedItems, item_ids: pa.LargeStringArray, user_ids: pa.Array
) -> pa.Table:
    is_item = lists.items >= 0
    items = Ragged.from_lengths(lists.items[is_item].astype(np.int32), lists.lengths)
    named = item_ids.take(pa.array(items.values)).cast(pa.string())
    offsets = pa.array(items.offsets.astype(np.int32))
    asked = {} if users.queries is None else {"query": pa.array(users.queries, pa.string())}
    return pa.table(
        {
            "user_index": pa.array(users.user_index),
            "user_id": user_ids,
            **asked,
            "items": items.to_arrow(),
            "item_ids": pa.ListArray.from_arrays(offsets, named),
            "scores": Ragged(lists.scores[is_item], items.offsets).to_arrow(),
        }
    )


def _part_stats(decoded: DecodedUsers, lists: RankedItems) -> dict[str, float]:
    return {
        "users": len(lists.items),
        "short": int((lists.items[:, -1] < 0).sum()),
        "emitted": decoded.num_emitted,
        "invalid": decoded.num_invalid,
        "seconds": decoded.seconds,
    }


def _file(part: Part) -> str:
    return f"{part.name}.parquet"


def _stats(filesystem: FileSystem, root: str, part: Part) -> dict[str, float]:
    schema = pq.read_schema(f"{root}/{_PARTS_FOLDER}/{_file(part)}", filesystem=filesystem)
    return dict(json.loads(schema.metadata[_STATS_KEY]))


def _report(
    stats: list[dict[str, float]], *, out: str, parts_resumed: int, users_per_s: float
) -> RecommendReport:
    total = {
        name: sum(one[name] for one in stats)
        for name in ("users", "short", "emitted", "invalid", "seconds")
    }
    return RecommendReport(
        out=out,
        users=int(total["users"]),
        parts=len(stats),
        parts_resumed=parts_resumed,
        users_per_s=users_per_s,
        decode_users_per_s=total["users"] / max(total["seconds"], 1e-9),
        invalid_rate=total["invalid"] / max(1.0, total["emitted"]),
        short_rate=total["short"] / max(1.0, total["users"]),
    )


def _write_json(filesystem: FileSystem, path: str, content: Mapping[str, Any]) -> None:
    """Whole or not at all: a killed run must find what it can read."""
    partial = f"{path}.{uuid.uuid4().hex}"
    with filesystem.open_output_stream(partial) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())
    filesystem.move(partial, path)
