"""Streams training batches of item indices out of sequence shards, the same ones at any world size.

An epoch is a permutation of the files, cut into *segments* of several files. One Ray Data task
reads a segment, permutes its rows, cuts long ones, sorts windows of rows by length and emits
*global batches*. What a global batch holds depends on the seed, the epoch and the segment alone;
each rank keeps every `world_size`-th row of it. So two workers see together exactly what one
worker sees, and a cursor of three numbers resumes at any step on any number of workers.

Every rank runs its own stream: no collective can hang because a rank came late or took another
number of batches. The price is that each rank reads all shards (item indices only, no codes).

Knows files, rows and ranks. Knows nothing about codes, tokens or models.
"""

from __future__ import annotations

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

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError, DataError

ExampleMode = Literal["window", "prefix", "whole"]
"""`window`: rows are pieces of sequences, every item is a target; `prefix`: rows are histories that
end in their target; `whole`: sequences are rows as they are."""


@dataclass(kw_only=True)
class StreamConfig:
    """How sequence shards become batches."""

    segment_files: int = 16
    """Files that one task reads and shuffles together; its memory grows with it."""
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


@dataclass(frozen=True)
class BatchPlan:
    """What decides the content and order of global batches, besides the files.

    Attributes:
        batch_rows: rows of a global batch.
        max_items: longest row; longer sequences are cut.
        mode: how sequences become rows.
        window_batches: global batches among which rows are sorted by length, at least 1.
        seed: of every permutation.
    """

    batch_rows: int
    max_items: int
    mode: ExampleMode
    window_batches: int
    seed: int


def epoch_segments(num_files: int, segment_files: int, *, seed: int, epoch: int) -> list[list[int]]:
    """File numbers of every segment of an epoch: each file once, in an order of that epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(num_files).tolist()
    return [order[start : start + segment_files] for start in range(0, num_files, segment_files)]


def cut_windows(sequences: Ragged, max_items: int, rng: np.random.Generator) -> Ragged:
    """Cuts sequences into consecutive pieces of at most `max_items`; every item is in one piece.

    The borders of long sequences are drawn anew each time, so that over epochs every item is seen
    after contexts of different lengths.
    """
    lengths = sequences.lengths
    shift = np.where(lengths > max_items, rng.integers(0, max_items, size=len(lengths)), 0)
    pieces = -(-(lengths + shift) // max_items)
    owner = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = np.maximum(number * max_items - shift[owner], 0)
    end = np.minimum((number + 1) * max_items - shift[owner], lengths[owner])
    return sequences.slices(sequences.offsets[owner] + start, end - start)


def cut_prefixes(sequences: Ragged, max_items: int) -> Ragged:
    """One row per item but the first of each sequence: that item last, its history before it."""
    position = sequences.positions
    target = np.flatnonzero(position > 0)
    length = np.minimum(position[target] + 1, max_items)
    return sequences.slices(target - length + 1, length)


def batch_order(
    lengths: NDArray[np.int64], *, batch_rows: int, window_batches: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Row numbers of each batch: permuted rows, sorted by length inside windows, batches permuted.

    Every row is in exactly one batch; only the last window has a batch below `batch_rows`.

    Args:
        lengths: [R] row lengths.
        batch_rows: rows of a batch.
        window_batches: batches of a window.
        rng: source of both permutations.
    """
    order = rng.permutation(len(lengths))
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), batch_rows * window_batches):
        window = order[start : start + batch_rows * window_batches]
        window = window[np.argsort(lengths[window], kind="stable")]
        chunks = [window[at : at + batch_rows] for at in range(0, len(window), batch_rows)]
        batches.extend(chunks[index] for index in rng.permutation(len(chunks)))
    return batches


def segment_rows(
    sequences: Ragged, plan: BatchPlan, *, epoch: int, segment: int
) -> tuple[Ragged, list[NDArray[np.int64]]]:
    """Training rows of one segment, and which of them each global batch holds."""
    rng = np.random.default_rng([plan.seed, epoch, segment])
    rows = sequences
    if plan.mode == "window":
        rows = cut_windows(sequences, plan.max_items, rng)
    elif plan.mode == "prefix":
        rows = cut_prefixes(sequences, plan.max_items)
    batches = batch_order(
        rows.lengths, batch_rows=plan.batch_rows, window_batches=plan.window_batches, rng=rng
    )
    return rows, batches


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

    def __call__(self, work: pa.Table) -> pa.Table:
        """Maps a table of segments (`epoch`, `segment`, `skip`, `files`) to a table of batches."""
        return pa.concat_tables([self._batches(**row) for row in work.to_pylist()])

    def _batches(self, *, epoch: int, segment: int, skip: int, files: list[str]) -> pa.Table:
        sequences = self.source.read(files, self.filesystem)
        rows, batches = segment_rows(sequences, self.plan, epoch=epoch, segment=segment)
        wanted = batches[skip:]
        mine = [batch[self.rank :: self.world_size] for batch in wanted]
        flat = [rows.take(batch) for batch in mine]
        numbers = np.arange(skip, len(batches))
        sizes = self.source.sizes(rows)
        return pa.table(
            {
                "epoch": np.full(len(wanted), epoch),
                "segment": np.full(len(wanted), segment),
                "batch": numbers,
                "items": _lists([part.values for part in flat], pa.int32()),
                "lengths": _lists([part.lengths for part in flat], pa.int32()),
                "global_lengths": _lists([sizes[batch] for batch in wanted], pa.int32()),
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
                    "row. Users need at least two training items for prefix examples."
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
            for segment in work:
                yield from _unpack(self._reader(pa.Table.from_pylist([segment])))
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
        # The consumer may pause for a validation or a checkpoint; that is no stall.
        context.execution_no_progress_timeout_s = -1
        for table in segments.iter_batches(batch_size=None, batch_format="pyarrow"):
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


def _lists(rows: list[NDArray[Any]], kind: pa.DataType) -> pa.Array:
    flat = np.concatenate(rows) if rows else np.empty(0, dtype=np.int32)
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind))


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
