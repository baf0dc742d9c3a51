"""The few Ray Data idioms that all stages of this package share.

Every distributed step here is a list of small inputs (file numbers, shard numbers), a function that
turns one input into Arrow tables, and results that are small again. Rows left out on request travel
in the same tables as *ledger rows*: `cause` and `count` set, every other column null.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.exceptions import RayError

from forge_ray.errors import ArtifactError, ConfigError, DataError, TrainingError

TaskFunction = Callable[..., Iterable[pa.Table]]

_OURS = {cls.__name__: cls for cls in (DataError, ConfigError, ArtifactError, TrainingError)}
_RAISED = re.compile(
    r"forge_ray\.errors\.(DataError|ConfigError|ArtifactError|TrainingError): ([^\n]+)"
)
LEDGER_FIELDS = (pa.field("cause", pa.string()), pa.field("count", pa.int64()))


def for_each(numbers: Sequence[int], fn: TaskFunction, **arguments: Any) -> ray.data.Dataset:
    """Build the lazy dataset of all tables that ``fn(number, **arguments)`` yields.

    Args:
        numbers: one task input each.
        fn: module-level generator function.
        arguments: sent along with the function; large ones as object references.
    """
    source = ray.data.from_items(
        [{"number": int(number)} for number in numbers], override_num_blocks=max(len(numbers), 1)
    )
    return source.map_batches(
        _each, batch_size=1, batch_format="pyarrow", fn_kwargs={"fn": fn, "arguments": arguments}
    )


def tables(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """Execute, and stream the resulting tables to this process.

    Raises:
        ForgeError: the error that a task raised, as itself and not wrapped by Ray.
    """
    # Ray logs a traceback for every failed task; ours are addressed to the user and end up once,
    # at the rim.
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.data.exceptions")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(max(one.getEffectiveLevel(), logging.CRITICAL))
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayError as error:
        raise _unwrapped(error) from None
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def results(dataset: ray.data.Dataset) -> pa.Table:
    """Execute, and return all rows as one table; for results that are small by design."""
    parts = [table for table in tables(dataset) if table.num_rows]
    return pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})


def ledger(schema: pa.Schema, counts: Mapping[str, int]) -> pa.Table:
    """Return one ledger row per cause, in a schema that has the ledger columns."""
    columns = {
        one.name: pa.nulls(len(counts), one.type) for one in schema if one not in LEDGER_FIELDS
    }
    columns["cause"] = pa.array(list(counts), pa.string())
    columns["count"] = pa.array(list(counts.values()), pa.int64())
    return pa.table(columns, schema=schema)


def data_rows(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """Return ordinary rows in a schema that has the ledger columns."""
    rows = len(next(iter(columns.values())))
    nulls = {one.name: pa.nulls(rows, one.type) for one in LEDGER_FIELDS}
    return pa.table({**columns, **nulls}, schema=schema)


def with_ledger(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return a schema of these columns and the ledger columns."""
    return pa.schema([*(pa.field(n, t) for n, t in columns.items()), *LEDGER_FIELDS])


def split_ledger(table: pa.Table, counts: Counter[str]) -> pa.Table:
    """Return the ordinary rows, and add the ledger rows to ``counts``."""
    if not table.num_rows:
        return table
    is_ledger = table["cause"].is_valid()
    for row in table.filter(is_ledger).select(["cause", "count"]).to_pylist():
        counts[row["cause"]] += row["count"]
    return table.filter(table["cause"].is_null())


def write_shard(table: pa.Table, path: str, filesystem: Any) -> None:
    """Write one Parquet shard; equal tables give equal bytes."""
    pq.write_table(table, path, filesystem=filesystem, compression="zstd", row_group_size=65536)


def _each(batch: pa.Table, *, fn: TaskFunction, arguments: Mapping[str, Any]) -> Iterator[pa.Table]:
    for number in batch["number"].to_pylist():
        yield from fn(number, **arguments)


def _unwrapped(error: RayError) -> Exception:
    # Ray drops the original exception object (its cause is a UserCodeException without one), but
    # keeps its traceback text; our messages are one line each.
    # Its text and not `traceback_str`: Ray's dual exception classes do not forward that one.
    found = _RAISED.findall(str(error))
    if not found:
        return error
    name, message = found[-1]
    return _OURS[name](message)
