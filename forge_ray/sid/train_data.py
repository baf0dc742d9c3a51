"""A training set as files that any worker maps, and the stream of batches that Ray Data reads.

Workers hold no vectors: a batch's rows are gathered from mapped files by Ray Data tasks and arrive
as they are needed. Resident are the batches that are on their way (`train.prefetch_batches` of each
worker, and the tasks' blocks in the object store) and, in each worker, five bytes a step. The pages
of the files are the operating system's cache, which gives way to whoever needs memory.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow.fs import FileSystem, LocalFileSystem

from forge_ray.embed.vectors import VectorSet
from forge_ray.errors import DataError
from forge_ray.sid.config import TrainConfig
from forge_ray.sid.quantizers.base import FloatArray, Int64Array, TrainingPairs, TrainingSet
from forge_ray.sid.quantizers.rq_vae_batches import (
    BatchPlan,
    Feed,
    StepBatch,
    StepRows,
    UserRows,
)

_CHUNK_BYTES = 1 << 26
_BLOCK_BYTES = 1 << 24
"""Bytes of batches that a reading task hands over at once."""
_ALWAYS = ("rows.plain", "rows.anchor", "rows.positive")
"""Arrays of every batch, be they empty."""
_STEPS_PER_EXECUTION = 4096
"""Steps of one Ray Data execution; starting one costs about a second."""


@dataclass(frozen=True)
class StagedSet:
    """A training set in a folder, one `.npy` file per array."""

    filesystem: FileSystem
    folder: str
    names: tuple[str, ...]
    """`vectors`, `pairs/<source>/<column>`, `teachers/<name>`, `users`, `user_teachers/<name>`."""

    def open(self) -> TrainingSet:
        """Map the files; those of a remote folder are copied to this machine once."""
        arrays = {name: np.load(self._local(name), mmap_mode="r") for name in self.names}
        sources = dict.fromkeys(
            name.split("/")[1] for name in self.names if name.startswith("pairs/")
        )
        return TrainingSet(
            vectors=arrays["vectors"],
            pairs={
                source: TrainingPairs(
                    **{
                        name.split("/")[2]: array
                        for name, array in arrays.items()
                        if name.startswith(f"pairs/{source}/")
                    }
                )
                for source in sources
            },
            teachers=_below(arrays, "teachers/"),
            users=arrays.get("users"),
            user_teachers=_below(arrays, "user_teachers/"),
        )

    def _local(self, name: str) -> Path:
        path = f"{self.folder}/{name}.npy"
        if isinstance(self.filesystem, LocalFileSystem):
            return Path(path)
        target = Path(tempfile.gettempdir(), "forge-ray-cache", *path.strip("/").split("/"))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
            with self.filesystem.open_input_stream(path) as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            partial.replace(target)
        return target


def _below(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def stage(data: TrainingSet, filesystem: FileSystem, folder: str) -> StagedSet:
    """Write a training set for workers to map; files that are there already are kept.

    Args:
        data: its arrays may be mapped from files themselves; 64 MiB of them are read at once.
        filesystem: that all nodes reach.
        folder: of this content alone; an earlier, killed call may have left files.
    """
    arrays = _arrays(data)
    filesystem.create_dir(folder, recursive=True)
    for name, array in arrays.items():
        path = f"{folder}/{name}.npy"
        if filesystem.get_file_info(path).is_file:
            continue
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        # An object store shows a file when it is complete; a disk, when it gets its name.
        partial = f"{path}.{uuid.uuid4().hex[:8]}"
        with filesystem.open_output_stream(partial) as sink:
            _write_array(sink, array)
        filesystem.move(partial, path)
    return StagedSet(filesystem, folder, tuple(arrays))


def _arrays(data: TrainingSet) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {"vectors": data.vectors}
    for source, pairs in data.pairs.items():
        for column in ("anchor", "positive", "user", "user_positive"):
            values = getattr(pairs, column)
            if values is not None:
                arrays[f"pairs/{source}/{column}"] = values
    arrays |= {f"teachers/{name}": array for name, array in data.teachers.items()}
    if data.users is not None:
        arrays["users"] = data.users
    return arrays | {f"user_teachers/{name}": one for name, one in data.user_teachers.items()}


def _write_array(sink: Any, array: npt.NDArray[Any]) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(array.dtype),
        "fortran_order": False,
        "shape": array.shape,
    }
    np.lib.format.write_array_header_1_0(sink, header)
    rows = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        sink.write(np.ascontiguousarray(array[start : start + rows]).tobytes())


def map_vectors(source: VectorSet, items: Int64Array, path: Path) -> FloatArray:
    """Copy the vectors of some items to a file and map it: what `VectorSet.take` gives, not held.

    Args:
        source: the catalogue.
        items: distinct item indices [n].
        path: of the file; written anew.

    Returns:
        float32 [n, D], mapped. Resident on the way: one batch, and 8 bytes per item.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.full(source.num_items, -1, dtype=np.int64)
    row[items] = np.arange(len(items))
    out = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(len(items), source.dim)
    )
    found = 0
    for batch in source.batches():
        rows = row[batch.indices]
        wanted = rows >= 0
        out[rows[wanted]] = batch.vectors[wanted]
        found += int(wanted.sum())
    if found != len(items):
        raise DataError(
            f"vectors must hold each of {len(items)} items once, got {found} rows of them. "
            "Run `forge-ray data validate`."
        )
    out.flush()
    return out


@dataclass(frozen=True)
class _Reader:
    """The Ray Data task: step numbers in, one worker's share of their batches out."""

    staged: StagedSet
    plan: BatchPlan
    rank: int
    size: int

    def __call__(self, work: pa.Table) -> pa.Table:
        """Gather ranges of steps, `first` to before `last`; one row a step, a column per array."""
        feed = Feed(self.staged.open(), self.plan, self.rank, self.size)
        numbers = [step for row in work.to_pylist() for step in range(row["first"], row["last"])]
        fields = [_fields(feed.batch(step)) for step in numbers]
        columns: dict[str, Any] = {"step": pa.array(numbers, pa.int64())}
        for name in dict.fromkeys(name for one in fields for name in one):
            columns[name] = _lists([one.get(name, np.zeros(0, np.float32)) for one in fields], name)
        return pa.table(columns)


def _fields(batch: StepBatch) -> dict[str, npt.NDArray[Any]]:
    rows = batch.rows
    fields: dict[str, npt.NDArray[Any]] = dict(
        zip(_ALWAYS, (rows.plain, rows.anchor, rows.positive), strict=True)
    )
    fields["vectors"] = batch.vectors
    fields |= {f"teacher.{name}": array for name, array in batch.teachers.items()}
    for side, users in enumerate(batch.users or ()):
        fields |= {f"rows.user{side}": users.users, f"user{side}.vectors": users.vectors}
        fields |= {f"user{side}.teacher.{name}": one for name, one in users.teachers.items()}
    return fields


def _lists(rows: list[npt.NDArray[Any]], name: str) -> pa.Array:
    kind = pa.int64() if name.startswith("rows.") else pa.float32()
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([row.size for row in rows], out=offsets[1:])
    flat = np.concatenate([row.reshape(-1) for row in rows])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind))


def _batch(plan: BatchPlan, step: int, fields: Mapping[str, npt.NDArray[Any]]) -> StepBatch:
    """The batch of `_fields`, flattened arrays back in shape."""
    plain, anchor = fields["rows.plain"], fields["rows.anchor"]
    users = tuple(_user_rows(fields, side) for side in (0, 1)) if "rows.user0" in fields else None
    kind = int(plan.kinds[step])
    rows = StepRows(
        plan.sources[kind] if len(anchor) else "",
        plain,
        anchor,
        fields["rows.positive"],
        None if users is None else (users[0].users, users[1].users),
    )
    known = _below(fields, "teacher.")
    return StepBatch(
        step,
        rows,
        fields["vectors"].reshape(len(rows.all), -1),
        {name: array.reshape(len(plain) + len(anchor), -1) for name, array in known.items()},
        None if users is None else (users[0], users[1]),
    )


def _user_rows(fields: Mapping[str, npt.NDArray[Any]], side: int) -> UserRows:
    numbers = fields[f"rows.user{side}"]
    known = _below(fields, f"user{side}.teacher.")
    return UserRows(
        numbers,
        fields[f"user{side}.vectors"].reshape(len(numbers), -1),
        {name: array.reshape(len(numbers), -1) for name, array in known.items()},
    )


@dataclass(frozen=True)
class BatchStream:
    """One worker's batches through Ray Data; every worker runs its own stream.

    So no collective can hang because one came late, and each gathers only its share.
    """

    staged: StagedSet
    plan: BatchPlan
    config: TrainConfig
    rank: int = 0
    size: int = 1

    def batches(self, start: int) -> Iterator[StepBatch]:
        """Yield the steps from `start` to the last, in order."""
        for first in range(start, self.plan.total, _STEPS_PER_EXECUTION):
            yield from self._execute(first, min(first + _STEPS_PER_EXECUTION, self.plan.total))

    def _execute(self, first: int, last: int) -> Iterator[StepBatch]:
        import ray.data

        per_task = self._steps_per_task()
        work = [
            {"first": at, "last": min(at + per_task, last)} for at in range(first, last, per_task)
        ]
        # `from_items` makes its blocks here; `from_arrow` would wait for a CPU that workers hold.
        dataset = ray.data.from_items(work, override_num_blocks=len(work)).map_batches(
            _Reader(self.staged, self.plan, self.rank, self.size),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=self.config.read_cpus,
            # Without a bound, tasks of 0 CPUs would all start at once, each in a new process.
            concurrency=self.config.read_tasks,
        )
        context = dataset.context
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        # The worker may pause for a measurement or a checkpoint; that is no stall.
        context.execution_no_progress_timeout_s = -1
        blocks = dataset.iter_batches(
            batch_size=None,
            batch_format="pyarrow",
            prefetch_batches=-(-self.config.prefetch_batches // per_task),
        )
        for table in blocks:
            for row, step in enumerate(table.column("step").to_pylist()):
                yield _batch(self.plan, step, _row(table, row))

    def _steps_per_task(self) -> int:
        data = self.staged.open()
        widths = data.vectors.shape[1] + sum(one.shape[1] for one in data.teachers.values())
        rows = max(self.plan.plain_size, 2 * self.plan.pair_size) // self.size
        return int(np.clip(_BLOCK_BYTES // max(1, 4 * widths * rows), 1, 256))


def _row(table: pa.Table, row: int) -> dict[str, npt.NDArray[Any]]:
    """One row's arrays, copied out of the object store so that its block can be released."""
    arrays = {
        name: table.column(name)[row].values.to_numpy(zero_copy_only=False).copy()
        for name in table.column_names
        if name != "step"
    }
    return {name: array for name, array in arrays.items() if len(array) or name in _ALWAYS}
