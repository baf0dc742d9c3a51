"""Raw files of users: finding them and reading them in chunks that know where they came from.

Knows CSV, JSONL, Parquet and `.npz`, on any pyarrow filesystem. It knows column names but not what
the columns mean, and it neither keeps nor writes anything. A file is read as a stream; only `.npz`
members are loaded whole, since the format allows nothing else.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from forge_ray.artifacts import open_filesystem
from forge_ray.data.sequences import EVENTS, SEQUENCE_COLUMNS, events_of
from forge_ray.errors import DataError

CHUNK_ROWS = 65536
BLOCK_BYTES = 8 * 2**20
HASH_WHOLE_BYTES = 64 * 2**20
HASH_END_BYTES = 2**20
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".npz": "npz",
}
SEQUENCES = "sequences"
"""Format of Parquet files with a row per sequence, read as events; no file name tells it."""
_SEQUENCES_AT_ONCE = 1024
# What Arrow raises on a file that is cut off or not what its name says.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, zipfile.BadZipFile, EOFError)


@dataclass(frozen=True, slots=True)
class RawFile:
    """One input file.

    Attributes:
        uri: what the user would type to find it again.
        format: one of the values of `FORMATS`, or `SEQUENCES`.
        ordinal: place in the input; files are ordered by name.
        size_bytes: its size.
        origin: number of the file that the rows of a `SEQUENCES` shard were imported from.
    """

    uri: str
    format: str
    ordinal: int
    size_bytes: int
    origin: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive rows of one file.

    Attributes:
        file: where the rows come from.
        first_row: number of the first row, counted from 1, headers not counted.
        table: the rows, columns under the names asked for.
    """

    file: RawFile
    first_row: int
    table: pa.Table


def list_files(path: str, *, field: str) -> list[RawFile]:
    """Find the input files at a file or folder path or URI, ordered by name.

    Args:
        path: a file, or a folder whose files (not those of its subfolders) are the shards.
        field: the configuration field the path came from, for messages.

    Raises:
        DataError: nothing is there, or the folder holds no file of a known format.
    """
    filesystem, inner = open_filesystem(path)
    info = filesystem.get_file_info(inner)
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"{field} must exist, got {path}. Check the path.")
    if info.type == pafs.FileType.File:
        found = [info]
    else:
        entries = filesystem.get_file_info(pafs.FileSelector(inner))
        found = sorted((e for e in entries if _is_shard(e)), key=lambda entry: entry.base_name)
    files = [
        RawFile(_uri(path, inner, one.path), FORMATS[_suffix(one.base_name)], ordinal, one.size)
        for ordinal, one in enumerate(found)
        if _suffix(one.base_name) in FORMATS
    ]
    if not files:
        raise DataError(
            f"{field} must hold {'/'.join(sorted(set(FORMATS.values())))} files, got none in "
            f"{path}. Check the path, or the names of the shards."
        )
    return files


def fingerprint(file: RawFile) -> dict[str, Any]:
    """Identify a file's content: name, size and a hash, wherever the file lies.

    Files above 64 MiB are hashed at both ends only (a Parquet footer holds statistics of all its
    columns), with their modification time.
    """
    filesystem, path = open_filesystem(file.uri)
    found: dict[str, Any] = {"name": path.rsplit("/", 1)[-1], "size_bytes": file.size_bytes}
    digest = hashlib.sha256()
    with filesystem.open_input_file(path) as source:
        if file.size_bytes <= HASH_WHOLE_BYTES:
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
        else:
            digest.update(source.read_at(HASH_END_BYTES, 0))
            digest.update(source.read_at(HASH_END_BYTES, file.size_bytes - HASH_END_BYTES))
            found["mtime_ns"] = filesystem.get_file_info(path).mtime_ns
    return found | {"sha256": digest.hexdigest()}


def column_names(file: RawFile) -> list[str]:
    """Return the columns of a file, or the arrays of an `.npz`.

    Raises:
        DataError: the file cannot be read.
    """
    with _readable(file) as source:
        return list(_names(file, source))


def require_columns(file: RawFile, wanted: Mapping[str, str], *, field: str) -> None:
    """Check that the mapped columns exist.

    Args:
        file: the file to look at.
        wanted: our name of a column → its name in the file.
        field: configuration section of the mapping, for messages.

    Raises:
        DataError: a column is missing; lists those there are.
    """
    names = column_names(file)
    for ours, theirs in wanted.items():
        if theirs not in names:
            raise DataError(
                f"{file.uri} must have a column {theirs!r}, got columns {names}. "
                f"Set {field}.{ours} to the column's name in your file."
            )


def read_chunks(
    file: RawFile,
    wanted: Mapping[str, str],
    *,
    field: str,
    extra: pa.Schema | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Iterator[Chunk]:
    """Stream a file in chunks of at most ``chunk_rows`` rows.

    Args:
        file: what to read.
        wanted: our name of a column → its name in the file; the chunk carries our names.
        field: configuration section of the mapping, for messages.
        extra: further columns to carry along, under their own names, with these types; a file
            that lacks one gives nulls.
        chunk_rows: most rows per chunk.

    Raises:
        DataError: a column is missing, or the file is truncated or malformed; names the file.
    """
    require_columns(file, wanted, field=field)
    first_row = 1
    with _readable(file) as source:
        for table in _tables(file, source, wanted, extra, chunk_rows):
            for start in range(0, table.num_rows, chunk_rows):
                part = table.slice(start, chunk_rows)
                yield Chunk(file, first_row, part)
                first_row += part.num_rows


def extra_schema(files: Sequence[RawFile], *, exclude: Sequence[str]) -> pa.Schema:
    """Return the columns that come along with the items, with one type each over all files.

    CSV columns are strings. Types are unified over the first rows of every file; a column that is
    null there becomes a string.

    Raises:
        DataError: a column has types in two files that no type covers.
    """
    schemas = []
    for file in files:
        with _readable(file) as source:
            schemas.append(_schema(file, source))
    try:
        unified = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"{files[0].uri} and the files beside it must agree on the types of their columns, "
            f"got: {error}. Write the column with one type, or leave it out."
        ) from error
    return pa.schema(
        [
            pa.field(one.name, pa.string() if pa.types.is_null(one.type) else one.type)
            for one in unified
            if one.name not in exclude
        ]
    )


class _readable:
    """Opens a file, and turns what Arrow, NumPy and zip say of a bad one into a DataError."""

    def __init__(self, file: RawFile) -> None:
        self._file = file
        self._stream: Any = None

    def __enter__(self) -> Any:
        filesystem, path = open_filesystem(self._file.uri)
        self._stream = filesystem.open_input_file(path)
        return self._stream

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stream.close()
        if isinstance(error, _UNREADABLE) and not isinstance(error, DataError):
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"{self._file.uri} must be a complete {self._file.format} file, got "
                f"{self._file.size_bytes} bytes that fail with: {reason}. "
                "Write or copy the file again."
            ) from error


def _uri(root_uri: str, root: str, path: str) -> str:
    """The URI of ``path``, which lies at or below ``root``, with the options of ``root_uri``."""
    base, mark, options = root_uri.partition("?")
    if "://" not in base:
        return path
    return f"{base.rstrip('/').removesuffix(root)}{path}{mark}{options}"


def _is_shard(entry: pafs.FileInfo) -> bool:
    return entry.type == pafs.FileType.File and not entry.base_name.startswith((".", "_"))


def _suffix(name: str) -> str:
    return f".{name.rsplit('.', 1)[-1].lower()}"


def _names(file: RawFile, source: Any) -> list[str]:
    if file.format == "npz":
        with np.load(source, allow_pickle=False) as archive:
            return list(archive.files)
    return list(_schema(file, source).names)


def _schema(file: RawFile, source: Any) -> pa.Schema:
    if file.format == SEQUENCES:
        return _sequence_schema(file, source)
    if file.format == "parquet":
        return pq.ParquetFile(source).schema_arrow
    if file.format == "jsonl":
        return pajson.open_json(source, read_options=_json_options()).schema
    if file.format == "npz":
        raise DataError(
            f"{file.uri} must be csv, jsonl or parquet, got npz, which holds vectors only. "
            "Give the file under `vectors`."
        )
    names = pacsv.open_csv(source, parse_options=_csv_options(file)).schema.names
    return pa.schema([(name, pa.string()) for name in names])


def _sequence_schema(file: RawFile, source: Any) -> pa.Schema:
    """The columns that the rows are read as, once it is sure that they can be."""
    names = pq.ParquetFile(source).schema_arrow.names
    if not set(SEQUENCE_COLUMNS) <= set(names):
        raise DataError(
            f"{file.uri} must have columns {list(SEQUENCE_COLUMNS)} to be read as sequences, got "
            f"{names}. Set interactions.layout=events for one row per interaction."
        )
    return EVENTS


def sequence_prefix(file: RawFile) -> str:
    """What the users of a file of sequences are called by, before the row."""
    name = file.uri.partition("?")[0].rpartition("/")[2]
    return name.rpartition(".")[0].removeprefix("part-")


def _sequence_batches(file: RawFile, source: Any, names: list[str]) -> Iterator[pa.RecordBatch]:
    prefix = sequence_prefix(file)
    first_row = 1
    for batch in pq.ParquetFile(source).iter_batches(
        _SEQUENCES_AT_ONCE, columns=list(SEQUENCE_COLUMNS)
    ):
        events = events_of(batch, first_row=first_row, prefix=prefix, file=file.origin)
        yield events.select(names)
        first_row += batch.num_rows


def _csv_options(file: RawFile) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(
        delimiter="\t" if file.format == "tsv" else ",", newlines_in_values=True
    )


def _json_options() -> pajson.ReadOptions:
    return pajson.ReadOptions(block_size=BLOCK_BYTES)


def _tables(
    file: RawFile,
    source: Any,
    wanted: Mapping[str, str],
    extra: pa.Schema | None,
    chunk_rows: int,
) -> Iterator[pa.Table]:
    if file.format == "npz":
        yield _npz_table(file, source, wanted)
        return
    present = _schema(file, source)
    source.seek(0)
    carried = [one for one in (extra or ()) if one.name in present.names]
    names = list(dict.fromkeys([*wanted.values(), *(one.name for one in carried)]))
    for batch in _batches(file, source, names, carried, chunk_rows):
        columns = {ours: batch.column(theirs) for ours, theirs in wanted.items()}
        for one in extra or ():
            has = one.name in present.names
            column = batch.column(one.name) if has else pa.nulls(len(batch), one.type)
            columns[one.name] = column.cast(one.type)
        yield pa.table(columns)


def _batches(
    file: RawFile, source: Any, names: list[str], carried: list[pa.Field], chunk_rows: int
) -> Iterator[pa.RecordBatch]:
    if file.format == SEQUENCES:
        yield from _sequence_batches(file, source, names)
        return
    if file.format == "parquet":
        yield from pq.ParquetFile(source).iter_batches(chunk_rows, columns=names)
        return
    if file.format == "jsonl":
        parse = pajson.ParseOptions(
            explicit_schema=pa.schema(carried), unexpected_field_behavior="infer"
        )
        yield from pajson.open_json(source, read_options=_json_options(), parse_options=parse)
        return
    convert = pacsv.ConvertOptions(
        include_columns=names,
        # As text: "00123" is an id, not a number, and a bad timestamp must be found by row.
        column_types={name: pa.string() for name in names},
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    read = pacsv.ReadOptions(block_size=BLOCK_BYTES)
    yield from pacsv.open_csv(
        source, read_options=read, parse_options=_csv_options(file), convert_options=convert
    )


def _npz_table(file: RawFile, source: Any, wanted: Mapping[str, str]) -> pa.Table:
    with np.load(source, allow_pickle=False) as archive:
        arrays = {ours: archive[theirs] for ours, theirs in wanted.items()}
    sizes = {ours: len(array) for ours, array in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(
            f"{file.uri} must hold arrays of one length, got {sizes}. "
            "Write one id and one vector per item."
        )
    return pa.table({ours: _to_arrow(file, ours, array) for ours, array in arrays.items()})


def _to_arrow(file: RawFile, name: str, array: NDArray[Any]) -> pa.Array:
    if array.ndim == 1:
        return pa.array(array.astype(str) if array.dtype.kind in "SU" else array)
    if array.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
    raise DataError(
        f"{file.uri} must hold ids [N] and vectors [N, D], got {name} of shape {array.shape}. "
        "Flatten the vectors to one row per item."
    )
