"""Import: users' files in any format become Parquet shards with conventional names and columns.

Checks each row by itself; whether items and vectors fit together is checked by `prepare`, which
reads the same formats directly. Import pays off when a log is read often or is slow to parse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs as pafs

from forge_ray.artifacts import open_filesystem
from forge_ray.data import tasks
from forge_ray.data.catalogue import RESERVED, Inputs, vector_dim
from forge_ray.data.checks import Screen, TimeUnit, as_ids, as_matrix, as_timestamps, is_empty
from forge_ray.data.importers import Chunk, RawFile, extra_schema, read_chunks
from forge_ray.data.log import find_inputs
from forge_ray.data.sources import SourcesConfig, event_columns, resolve
from forge_ray.errors import ConfigError, DataError

_ROWS = tasks.with_ledger({"part": pa.string(), "rows": pa.int64()})


@dataclass(kw_only=True)
class ImportConfig(SourcesConfig):
    """What to import, and where to."""

    output: str = ""
    """Folder to write `interactions/`, `items/` and `vectors/<space>/` to; new or empty."""

    def __post_init__(self) -> None:
        """Check that there is somewhere to write to."""
        super().__post_init__()
        if not self.output:
            raise ConfigError("output must name a folder, got none. Add output=path.")


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did.

    Attributes:
        directory: the folder written.
        rows: rows written by part.
        skipped: rows left out by cause.
    """

    directory: str
    rows: dict[str, int]
    skipped: dict[str, int]


def import_data(config: ImportConfig) -> ImportReport:
    """Write every input as Parquet shards, one per chunk read; Ray must be running.

    Raises:
        DataError: a row breaks a rule, or the output folder holds something.
    """
    resolved = resolve(config)
    inputs = find_inputs(resolved)
    filesystem, root = _empty_folder(config.output)
    rows: dict[str, int] = {}
    ledger = tasks.Ledger()
    for part, files, wanted, section in _parts(resolved, inputs):
        filesystem.create_dir(f"{root}/{part}", recursive=True)
        reserved = [wanted["item_id"], *RESERVED]
        space = section.partition(".")[2]
        done = tasks.for_each(
            range(len(files)),
            _convert,
            part=part,
            files=files,
            wanted=wanted,
            section=section,
            extra=extra_schema(files, exclude=reserved) if part == "items" else None,
            dim=vector_dim(files[0], resolved.vectors[space], section) if space else None,
            unit=resolved.interactions.timestamp_unit,
            skip=frozenset(config.skip),
            output=tasks.Output(filesystem, f"{root}/{part}"),
        )
        written = tasks.split_ledger(tasks.results(done), ledger)
        rows[part] = int(written["rows"].to_numpy().sum())
    return ImportReport(config.output, rows, dict(ledger.counts))


def _empty_folder(uri: str) -> tuple[pafs.FileSystem, str]:
    filesystem, root = open_filesystem(uri)
    entries = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    if entries:
        raise DataError(
            f"output must be a new or empty folder, got {root} with {len(entries)} entries. "
            "Choose another folder, or delete this one."
        )
    return filesystem, root


def _parts(
    config: SourcesConfig, inputs: Inputs
) -> Iterator[tuple[str, Sequence[RawFile], Mapping[str, str], str]]:
    yield "interactions", inputs.interactions, event_columns(config), "interactions"
    if inputs.items:
        yield "items", inputs.items, {"item_id": config.items.item_id}, "items"
    for space, files in inputs.vectors.items():
        source = config.vectors[space]
        wanted = {"item_id": source.item_id, "vector": source.vector}
        yield f"vectors/{space}", files, wanted, f"vectors.{space}"


def _convert(
    number: int,
    *,
    part: str,
    files: Sequence[RawFile],
    wanted: Mapping[str, str],
    section: str,
    extra: pa.Schema | None,
    dim: int | None,
    unit: TimeUnit,
    skip: frozenset[str],
    output: tasks.Output,
) -> Iterator[pa.Table]:
    chunks = read_chunks(files[number], wanted, field=section, extra=extra)
    for place, chunk in enumerate(chunks):
        screen = Screen(chunk, skip)
        table = _converted(screen, wanted, dim=dim, unit=unit).filter(pa.array(screen.keep))
        output.write(table, number, place)
        count = pa.array([table.num_rows], pa.int64())
        yield tasks.data_rows(_ROWS, {"part": [part], "rows": count})
        yield tasks.ledger_rows(_ROWS, screen.ledger)


def _converted(
    screen: Screen, wanted: Mapping[str, str], *, dim: int | None, unit: TimeUnit
) -> pa.Table:
    chunk: Chunk = screen.chunk
    table = chunk.table
    for column, cause in (("user_id", "empty_user"), ("item_id", "empty_item")):
        if column in wanted:
            ids = as_ids(chunk, column)
            screen.reject(cause, is_empty(ids), column=column, rule="not be empty")
            table = _replaced(table, column, column, ids)
    if "timestamp" in wanted:
        times = pa.array(as_timestamps(screen, "timestamp", unit))
        table = _replaced(table, "timestamp", "timestamp", times)
    if "vector" in wanted:
        matrix = as_matrix(screen, "vector", dim)
        flat = pa.array(matrix.reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
        table = _replaced(table, "vector", "embedding", lists)
    return table


def _replaced(table: pa.Table, old: str, new: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(old), new, values)
