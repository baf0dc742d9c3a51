"""Streams training batches of item indices out of sequence shards, the same ones at any world size.

An epoch is a permutation of the files, cut into *segments* of several files. One Ray Data task
reads a segment, permutes its rows, sorts windows of rows by length and emits *global batches*. What
a global batch holds depends on the seed, the epoch and the segment alone; each rank keeps every
`world_size`-th row of it. So two workers see together exactly what one worker sees, and a cursor of
three numbers resumes at any step on any number of workers.

**Memory.** A task holds the items of its segment, 4 bytes each and twice that while it reads, 4
bytes for each row and 16 for each sequence. Rows are cut out for some batches at a time
(`_VALUES_AT_ONCE`; a larger batch comes alone) and leave in blocks of 8 MiB; a few of those wait
for the trainer, and the task waits with them. Where every item ends a row of its own, as for T5,
that is about 8 bytes for an item of the segment beside a few MB: 14 MiB of arrays for 1 M items
with histories of 20, which were 302 when all rows were cut out at once.

Every rank runs its own stream: no collective can hang because a rank came late or took another
number of batches. The price is that each rank reads all shards (item indices only, no codes).

Knows files, rows and ranks. Knows nothing about codes, tokens or models.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from forge_ray.data.examples import BatchPlan, in_groups, segment_rows
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError, DataError

_VALUES_AT_ONCE = 1 << 18
"""Items of rows that are cut out together; NumPy takes about 30 bytes for each while it does."""
_BLOCK_BYTES = 8 << 20
"""Size of Ray Data's blocks of batches; its own 128 MiB would be filled before the first one."""


@dataclass(kw_only=True)
class StreamConfig:
    """How sequence shards become batches."""

    targets: Literal["all", "last"] = "all"
    """Items of a train sequence that are answers, for models of one answer a row: a row for every
    one after the first, or for the last one only. Models that learn every item of a row take `all`;
    rows of queries and of the catalogue have their own answers."""
    segment_files: int = 16
    """Files that one task reads and shuffles together; it holds their items, 4 bytes each."""
    window_batches: int = 0
    """Global batches among which rows are sorted by length: padding against randomness. 0 sorts
    over 64 for models that pad their rows and not at all for models that pack them."""
    segments_per_execution: int = 8
    """Segments, over epochs, that one Ray Data execution covers; starting one costs about 1 s."""
    prefetch_batches: int = 32
    """Batches kept ready for the training loop (item indices only, a few kB each)."""
    read_tasks: int = 1
    """Segments that each worker reads at a time."""
    read_cpus: float = 0.0
    """CPUs that Ray reserves per reading task. 0 never waits for a free CPU on a small machine."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.window_batches < 0:
            raise ConfigError(
                f"data.window_batches must be >= 0, got {self.window_batches}. Use 0 to leave it "
                "to the model."
            )
        for name in ("segment_files", "segments_per_execution", "read_tasks"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"data.{name} must be >= 1, got {getattr(self, name)}. "
                    "Leave it out for the default."
                )


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands: the next batch to deliver. Independent of the world size."""

    epoch: int = 0
    segment: int = 0
    batch: int = 0


@dataclass(frozen=True)
class StreamBatch:
    """One rank's share of a global batch.

    Attributes:
        rows: item indices of this rank's rows, shortest first; may be empty.
        global_lengths: int [R], sizes of all rows of the global batch (`RowSource.sizes`).
        following: cursor of the batch after this one.
    """

    rows: Ragged
    global_lengths: NDArray[np.int64]
    following: Cursor


def epoch_segments(num_files: int, segment_files: int, *, seed: int, epoch: int) -> list[list[int]]:
    """File numbers of every segment of an epoch: each file once, in an order of that epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(num_files).tolist()
    return [order[start : start + segment_files] for start in range(0, num_files, segment_files)]


class RowSource(Protocol):
    """What the shards of a stream hold; picklable."""

    def read(self, files: Sequence[str], filesystem: pafs.FileSystem) -> Ragged:
        """Sequences of integers of all rows of Parquet shards, in file order."""

    def sizes(self, rows: Ragged) -> NDArray[np.int64]:
        """What every rank is told of each training row [R], besides its own rows."""


@dataclass(frozen=True)
class ItemSequences:
    """Sequence shards of a dataset: item indices; a row's size is its length."""

    def read(self, files: Sequence[str], filesystem: pafs.FileSystem) -> Ragged:
        """See `RowSource.read`."""
        return read_sequences(files, filesystem)

    def sizes(self, rows: Ragged) -> NDArray[np.int64]:
        """See `RowSource.sizes`."""
        return rows.lengths


@dataclass(frozen=True)
class SegmentReader:
    """The Ray Data task: one segment in, this rank's share of its global batches out."""

    filesystem: pafs.FileSystem
    plan: BatchPlan
    rank: int
    world_size: int
    source: RowSource = ItemSequences()

    def __call__(self, work: pa.Table) -> Generator[pa.Table, None, None]:
        """Maps a table of segments (`epoch`, `segment`, `skip`, `files`) to tables of batches."""
        for row in work.to_pylist():
            yield from self._tables(**row)

    def _tables(
        self, *, epoch: int, segment: int, skip: int, files: list[str]
    ) -> Iterator[pa.Table]:
        sequences = self.source.read(files, self.filesystem)
        rows, batches = segment_rows(sequences, self.plan, epoch=epoch, segment=segment)
        wanted = itertools.islice(batches, skip, None)
        number = skip
        for group in in_groups(rows, wanted, num_values=_VALUES_AT_ONCE):
            cut = rows.take(np.concatenate(group))
            sizes = np.array([len(batch) for batch in group])
            yield self._table(cut, sizes, epoch=epoch, segment=segment, number=number)
            number += len(group)

    def _table(
        self, rows: Ragged, sizes: NDArray[np.int64], *, epoch: int, segment: int, number: int
    ) -> pa.Table:
        """This rank's share of successive batches.

        Args:
            rows: of all batches, one after the other.
            sizes: [N], rows of each batch.
            epoch: of the batches.
            segment: of the batches.
            number: of the first batch.
        """
        ends = np.cumsum(sizes)
        place = np.arange(len(rows)) - np.repeat(ends - sizes, sizes)
        mine = rows.take(place % self.world_size == self.rank) if self.world_size > 1 else rows
        # Every `world_size`-th row from this rank's on.
        shares = np.maximum(0, -(-(sizes - self.rank) // self.world_size))
        own = np.concatenate([[0], np.cumsum(shares)])
        return pa.table(
            {
                "epoch": np.full(len(sizes), epoch),
                "segment": np.full(len(sizes), segment),
                "batch": np.arange(number, number + len(sizes)),
                "items": _lists(mine.values, mine.offsets[own]),
                "lengths": _lists(mine.lengths, own),
                "global_lengths": _lists(self.source.sizes(rows), np.concatenate([[0], ends])),
            }
        )


def read_sequences(files: Sequence[str], filesystem: pafs.FileSystem) -> Ragged:
    """Item indices of all rows of Parquet shards, in file order.

    Raises:
        DataError: a shard is not readable.
    """
    parts = []
    for path in files:
        try:
            table = pq.read_table(path, filesystem=filesystem, columns=["items"])
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{path} must be a readable Parquet shard, got: {error}. Run `data prepare` again."
            ) from error
        parts.append(Ragged.from_arrow(table.column("items")))
    return Ragged.concatenate(parts)


class SequenceStream:
    """Endless batches of one rank, from any cursor on."""

    files: Sequence[str]
    config: StreamConfig
    plan: BatchPlan

    def __init__(
        self,
        files: Sequence[str],
        filesystem: pafs.FileSystem,
        config: StreamConfig,
        *,
        plan: BatchPlan,
        rank: int = 0,
        world_size: int = 1,
        source: RowSource | None = None,
        is_local: bool = False,
    ) -> None:
        """Plans the stream; nothing is read.

        Args:
            files: sequence shards.
            filesystem: they are on.
            config: how they are read.
            plan: what decides the batches.
            rank: of this worker.
            world_size: workers.
            source: makes rows of a shard; item sequences where none is given.
            is_local: read where the batches are used, without Ray Data.
        """
        if not files:
            raise DataError(
                "a stream must have at least one shard, got none. Make the dataset (or the query "
                "set) again."
            )
        self.files = sorted(files)
        self.config = config
        self.plan = plan
        self._is_local = is_local
        self._reader = SegmentReader(filesystem, plan, rank, world_size, source or ItemSequences())

    def batches(self, cursor: Cursor) -> Iterator[StreamBatch]:
        """Yields batches for ever, epoch after epoch, starting at `cursor`."""
        work = self._work(cursor)
        num_barren = 0
        while True:
            todo = [next(work) for _ in range(self.config.segments_per_execution)]
            # Of a segment that is only skipped nothing is known.
            num_barren += sum(not one["skip"] for one in todo)
            for batch in self._execute(todo):
                num_barren = 0
                yield batch
            if num_barren >= self._num_segments:
                raise DataError(
                    f"{self.files[0]} and the other shards must hold sequences, got no training "
                    "row. Users need at least two training items where a row has one answer."
                )

    @property
    def _num_segments(self) -> int:
        return -(-len(self.files) // self.config.segment_files)

    def _work(self, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """Segments in training order from `cursor` on, without end."""
        epoch, first, skip = cursor.epoch, cursor.segment, cursor.batch
        while True:
            segments = epoch_segments(
                len(self.files), self.config.segment_files, seed=self.plan.seed, epoch=epoch
            )
            for number in range(first, len(segments)):
                files = [self.files[index] for index in segments[number]]
                yield {"epoch": epoch, "segment": number, "skip": skip, "files": files}
                skip = 0
            epoch, first = epoch + 1, 0

    def _execute(self, work: list[dict[str, Any]]) -> Iterator[StreamBatch]:
        """Runs one Ray Data execution over some segments, in order."""
        if self._is_local:
            yield from self._execute_here(work)
            return
        import ray.data

        segments = ray.data.from_items(work, override_num_blocks=len(work)).map_batches(
            self._reader,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=self.config.read_cpus,
            # Without a bound, tasks of 0 CPUs would all start at once, each in a new process.
            concurrency=self.config.read_tasks,
        )
        context = segments.context
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.target_max_block_size = _BLOCK_BYTES
        # The consumer may pause for a validation or a checkpoint; that is no stall.
        context.execution_no_progress_timeout_s = -1
        for table in segments.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from _unpack(table)

    def _execute_here(self, work: list[dict[str, Any]]) -> Iterator[StreamBatch]:
        for table in self._reader(pa.Table.from_pylist(work)):
            yield from _unpack(table)


def prefetched(batches: Iterator[StreamBatch], depth: int) -> Generator[StreamBatch, None, None]:
    """The same batches, read ahead in a thread; errors of the thread are raised here.

    Args:
        batches: any iterator; only the thread touches it.
        depth: batches to hold ready.
    """
    ready: queue.Queue[StreamBatch | BaseException] = queue.Queue(maxsize=max(1, depth))
    stop = threading.Event()
    thread = threading.Thread(
        target=_pump, args=(batches, ready, stop), name="forge-ray-stream", daemon=True
    )
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def _pump(
    batches: Iterator[StreamBatch],
    ready: queue.Queue[StreamBatch | BaseException],
    stop: threading.Event,
) -> None:
    item: StreamBatch | BaseException | None = None
    while not (stop.is_set() or isinstance(item, BaseException)):
        try:
            item = next(batches)
        except BaseException as error:  # noqa: BLE001  (handed to the consumer, not swallowed)
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                break
            except queue.Full:
                continue
    if isinstance(batches, Generator):
        batches.close()  # ends the running Ray Data execution


def _lists(values: NDArray[Any], offsets: NDArray[np.int64]) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, type=pa.int32()))


def _unpack(table: pa.Table) -> Iterator[StreamBatch]:
    items = Ragged.from_arrow(table.column("items"))
    lengths = Ragged.from_arrow(table.column("lengths"))
    everyone = Ragged.from_arrow(table.column("global_lengths"))
    places = table.select(["epoch", "segment", "batch"]).to_pylist()
    for row, place in enumerate(places):
        # Copied out of the shared object store, so that the block can be released.
        mine = Ragged.from_lengths(items.row(row).copy(), lengths.row(row).astype(np.int64))
        following = Cursor(place["epoch"], place["segment"], place["batch"] + 1)
        yield StreamBatch(mine, everyone.row(row).astype(np.int64), following)
