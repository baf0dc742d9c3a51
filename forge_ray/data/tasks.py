"""The few Ray Data idioms that all stages of this package share.

Every distributed step here is a list of small inputs (file numbers, shard numbers), a function that
turns one input into Arrow tables, and results that are small again. Rows left out on request travel
in the same tables as *ledger rows*: `cause`, `count` and an `example` set, other columns null.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.context import ShuffleStrategy
from ray.exceptions import RayError

from forge_ray.artifacts import ArtifactWriter
from forge_ray.errors import ArtifactError, ConfigError, DataError, TrainingError

T = TypeVar("T")
TaskFunction = Callable[..., Iterable[pa.Table]]

_OURS = {cls.__name__: cls for cls in (DataError, ConfigError, ArtifactError, TrainingError)}
_RAISED = re.compile(
    r"forge_ray\.errors\.(DataError|ConfigError|ArtifactError|TrainingError): ([^\n]+)"
)
SMALL_EXCHANGE = 8
EXCHANGED_AT_ONCE = 128 * 2**20
"""Bytes of rows that one task of the default exchange distributes. Ray's 1 GiB keep a machine of
few cores waiting for the first gigabyte."""
MAX_BLOCKS = 1024
LEDGER_FIELDS = (
    pa.field("cause", pa.string()),
    pa.field("count", pa.int64()),
    pa.field("example", pa.string()),
)


@dataclass(slots=True)
class Ledger:
    """Rows that broke a rule and were passed over.

    Attributes:
        counts: rows by cause.
        examples: what an error would have said of the first such row, by cause.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, cause: str, count: int, example: str) -> None:
        """Count rows; the first example of a cause stays."""
        if count:
            self.counts[cause] += count
            self.examples.setdefault(cause, example)

    def update(self, other: Ledger) -> None:
        """Add another ledger."""
        for cause, count in other.counts.items():
            self.add(cause, count, other.examples[cause])


def for_each(numbers: Sequence[int], fn: TaskFunction, **arguments: Any) -> ray.data.Dataset:
    """Build the lazy dataset of all tables that ``fn(number, **arguments)`` yields.

    Args:
        numbers: one task input each.
        fn: module-level generator function.
        arguments: sent along with the function; large ones as object references.
    """
    source = ray.data.from_items(
        [{"number": int(number)} for number in numbers],
        override_num_blocks=min(max(len(numbers), 1), MAX_BLOCKS),
    )
    return source.map_batches(
        _each, batch_size=1, batch_format="pyarrow", fn_kwargs={"fn": fn, "arguments": arguments}
    )


def exchange(
    dataset: ray.data.Dataset, fn: Callable[..., pa.Table], *, shards: int, **arguments: Any
) -> ray.data.Dataset:
    """Bring all rows with the same `shard` number together, and call ``fn(rows, **arguments)``.

    Args:
        dataset: tables with an integer column `shard`.
        fn: module-level function of one shard's rows, in no particular order.
        shards: how many shards there are.
        arguments: sent along with the function.
    """
    if shards <= SMALL_EXCHANGE:
        # Ray's default exchange starts workers of its own, which takes up to 10 s on two cores;
        # this one runs in those that are there (0.2 s), but holds all rows twice and makes blocks
        # by the square of the shards.
        dataset.context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    dataset.context.shuffle_input_batch_bytes = EXCHANGED_AT_ONCE
    return dataset.groupby("shard", num_partitions=shards).map_groups(
        _group, batch_format="pyarrow", fn_kwargs={"fn": fn, "arguments": arguments}
    )


def tables(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """Execute, and stream the resulting tables to this process.

    Raises:
        ForgeError: the error that a task raised, as itself and not wrapped by Ray.
    """
    with _quiet():
        try:
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        except RayError as error:
            raise unwrapped(error) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from logging a traceback for every failed task.

    Ours are addressed to the user and end up once, at the rim.
    """
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.data.exceptions")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(max(one.getEffectiveLevel(), logging.CRITICAL))
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def results(dataset: ray.data.Dataset) -> pa.Table:
    """Execute, and return all rows as one table; for results that are small by design."""
    parts = [table for table in tables(dataset) if table.num_rows]
    return pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})


def gathered(
    dataset: ray.data.Dataset, fn: Callable[..., tuple[Any, T]], **arguments: Any
) -> tuple[ray.ObjectRef[Any], T]:
    """Execute, and call ``fn(tables, **arguments)`` in one worker, for what the driver cannot hold.

    Args:
        dataset: its tables come to the worker in no particular order.
        fn: module-level function of an iterator of tables, of a large result and a small one.
        arguments: sent along with the function.

    Returns:
        A reference to the large result, and the small one.

    Raises:
        ForgeError: the error that a task raised, as itself and not wrapped by Ray.
    """
    with _quiet():
        try:
            blocks = dataset.to_arrow_refs()
            large, small = _gather.remote(fn, arguments, blocks)
            return large, ray.get(small)
        except RayError as error:
            raise unwrapped(error) from None


@ray.remote(num_returns=2)
def _gather(
    fn: Callable[..., tuple[Any, Any]], arguments: Mapping[str, Any], blocks: list[Any]
) -> tuple[Any, Any]:
    limit_threads()
    return fn((ray.get(block) for block in blocks), **arguments)


def ledger_rows(schema: pa.Schema, ledger: Ledger) -> pa.Table:
    """Return one ledger row per cause, in a schema that has the ledger columns."""
    causes = list(ledger.counts)
    columns = {one.name: pa.nulls(len(causes), one.type) for one in schema}
    columns["cause"] = pa.array(causes, pa.string())
    columns["count"] = pa.array([ledger.counts[cause] for cause in causes], pa.int64())
    columns["example"] = pa.array([ledger.examples[cause] for cause in causes], pa.string())
    return pa.table(columns, schema=schema)


def data_rows(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """Return ordinary rows in a schema that has the ledger columns."""
    rows = len(next(iter(columns.values())))
    nulls = {one.name: pa.nulls(rows, one.type) for one in LEDGER_FIELDS}
    return pa.table({**columns, **nulls}, schema=schema)


def with_ledger(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return a schema of these columns and the ledger columns."""
    return pa.schema([*(pa.field(n, t) for n, t in columns.items()), *LEDGER_FIELDS])


def split_ledger(table: pa.Table, ledger: Ledger) -> pa.Table:
    """Return the ordinary rows, and add the ledger rows to ``ledger``."""
    if not table.num_rows:
        return table
    is_ledger = table["cause"].is_valid()
    for row in table.filter(is_ledger).select([one.name for one in LEDGER_FIELDS]).to_pylist():
        ledger.add(row["cause"], row["count"], row["example"])
    return table.filter(table["cause"].is_null())


@dataclass(frozen=True, slots=True)
class Output:
    """A folder that tasks write shards to."""

    filesystem: Any
    folder: str

    @classmethod
    def below(cls, writer: ArtifactWriter, *parts: str) -> Output:
        """A folder of an artifact that is being built; it exists afterwards."""
        return cls(writer.filesystem, writer.path(*parts, "part").removesuffix("/part"))

    def write(self, table: pa.Table, *numbers: int) -> None:
        """Write one Parquet shard named by its numbers."""
        name = "-".join(["part", *(f"{number:05d}" for number in numbers)])
        write_shard(table, f"{self.folder}/{name}.parquet", self.filesystem)


def write_shard(table: pa.Table, path: str, filesystem: Any) -> None:
    """Write one Parquet shard; equal tables give equal bytes."""
    pq.write_table(table, path, filesystem=filesystem, compression="zstd", row_group_size=65536)


def _each(batch: pa.Table, *, fn: TaskFunction, arguments: Mapping[str, Any]) -> Iterator[pa.Table]:
    limit_threads()
    for number in batch["number"].to_pylist():
        yield from fn(number, **arguments)


def _group(
    rows: pa.Table, *, fn: Callable[..., pa.Table], arguments: Mapping[str, Any]
) -> pa.Table:
    limit_threads()
    return fn(rows, **arguments)


def limit_threads() -> int:
    """Limit Arrow to the CPUs of the running task, and return their number.

    Arrow would use every core in every worker. Nothing else here computes in threads; loading torch
    and faiss only to limit them too (`forge_ray.threads`) would cost seconds per worker.
    """
    assigned = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    threads = max(1, int(assigned))
    pa.set_cpu_count(threads)
    return threads


def unwrapped(error: RayError) -> Exception:
    """The error of ours that a task raised, as itself; any other as it came."""
    # Ray drops the original exception object (its cause is a UserCodeException without one), but
    # keeps its traceback text; our messages are one line each.
    # Its text and not `traceback_str`: Ray's dual exception classes do not forward that one.
    found = _RAISED.findall(str(error))
    if not found:
        return error
    name, message = found[-1]
    return _OURS[name](message)
