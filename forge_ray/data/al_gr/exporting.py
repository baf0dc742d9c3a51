"""Export of imported AL-GR files: the files as they were, without the rows that were left out.

Text files come back byte for byte where they are quoted as needed or throughout, archives with
equal arrays. A file is written under another name and renamed when complete; on a local disk one
that was interrupted goes on after its last whole shard. Ray must be running.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from forge_ray.data import tasks
from forge_ray.data.al_gr.folder import AlGrFolder, FileRecord, Settings, skipped_in_all
from forge_ray.data.al_gr.layouts import Layout, encoding_name
from forge_ray.data.al_gr.npz import Header, write_archive
from forge_ray.data.al_gr.rows import encode
from forge_ray.data.al_gr.target import Target
from forge_ray.data.al_gr.text_files import header_line, joined, spell_lines

_DONE = pa.schema({"number": pa.int64()})


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did.

    Attributes:
        directory: the folder written.
        version: tag of the SIDs.
        files: bytes by file.
        left_out: rows of the original files that the import left out, by cause.
    """

    directory: str
    version: str
    files: dict[str, int]
    left_out: dict[str, int]


def export_al_gr(source: str, output: str) -> ExportReport:
    """Write the files of an import back; those that are complete in the output stay.

    Args:
        source: folder of the import.
        output: folder to write to: new, or one that the same export began.

    Raises:
        DataError: the import is incomplete, or the output holds the files of another one.
    """
    folder = AlGrFolder.at(source)
    settings, records = folder.finished()
    target = Target.at(output)
    target.claim({one.name: dict(one.fingerprint) for one in records})
    numbers = [n for n, one in enumerate(records) if target.size(one.name) is None]
    done = tasks.for_each(
        numbers, _export_file, folder=folder, settings=settings, records=records, target=target
    )
    tasks.results(done)
    return ExportReport(
        directory=output,
        version=settings.version,
        files={one.name: target.size(one.name) or 0 for one in records},
        left_out=skipped_in_all(records),
    )


def _export_file(
    number: int,
    *,
    folder: AlGrFolder,
    settings: Settings,
    records: list[FileRecord],
    target: Target,
) -> Iterator[pa.Table]:
    record = records[number]
    path = target.path(record.name)
    if record.layout.is_text:
        _write_text(folder, number, record, settings, target, f"{path}.partial")
    else:
        with target.filesystem.open_output_stream(f"{path}.partial") as stream:
            write_archive(stream, _arrays(folder, number, record))
    target.filesystem.move(f"{path}.partial", path)
    yield pa.table({"number": [number]}, schema=_DONE)


# ---- text ----


def _write_text(
    folder: AlGrFolder,
    number: int,
    record: FileRecord,
    settings: Settings,
    target: Target,
    path: str,
) -> None:
    shards = [s for part in record.rows for s in folder.shards(part, number)]
    done = _resume(target, path)
    # Without a local disk there is no appending: the file begins again.
    opened = target.filesystem.open_append_stream if done else target.filesystem.open_output_stream
    with opened(path) as stream:
        if not done:
            stream.write(header_line(record.layout))
        for place, shard in enumerate(shards[done:], start=done + 1):
            is_last = place == len(shards)
            for lines, ends in _lines(folder, shard, record.layout, settings):
                whole = joined(lines, record.layout)
                if is_last and ends and not record.layout.final_eol:
                    whole = whole.removesuffix(record.layout.eol.encode())
                stream.write(whole)
            stream.flush()
            _remember(target, path, place, stream.tell())
    if target.filesystem.get_file_info(f"{path}.json").type == pafs.FileType.File:
        target.filesystem.delete_file(f"{path}.json")


def _lines(
    folder: AlGrFolder, shard: str, layout: Layout, settings: Settings
) -> Iterator[tuple[pa.Array, bool]]:
    """The lines of a shard, a row group at a time, and whether they are its last."""
    with folder.filesystem.open_input_file(shard) as source:
        file = pq.ParquetFile(source)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            fields = encode(layout, table, settings.reading)
            yield spell_lines(fields, layout), group == file.num_row_groups - 1


def _resume(target: Target, path: str) -> int:
    """Shards that an interrupted export wrote whole; what follows them is cut off."""
    is_local = isinstance(target.filesystem, pafs.LocalFileSystem)
    found = target.filesystem.get_file_info([path, f"{path}.json"])
    if not is_local or any(one.type != pafs.FileType.File for one in found):
        return 0
    with target.filesystem.open_input_file(f"{path}.json") as stream:
        state = json.loads(stream.read())
    with open(path, "r+b") as file:
        file.truncate(state["bytes"])
    return int(state["shards"])


def _remember(target: Target, path: str, shards: int, size: int) -> None:
    if isinstance(target.filesystem, pafs.LocalFileSystem):
        with target.filesystem.open_output_stream(f"{path}.json.new") as stream:
            stream.write(json.dumps({"shards": shards, "bytes": size}).encode())
        target.filesystem.move(f"{path}.json.new", f"{path}.json")


# ---- archives ----


def _arrays(
    folder: AlGrFolder, number: int, record: FileRecord
) -> dict[str, tuple[Header, Iterator[Any]]]:
    layout = record.layout
    space = record.name.rpartition("/")[2].rpartition(".")[0]
    found: dict[str, tuple[Header, Iterator[Any]]] = {}
    for name in layout.columns:
        head = layout.arrays[name]
        if name == "embeds":
            slices = _column(folder, f"vectors/{space}", number, "embedding", head)
        elif name == "ids":
            slices = _column(folder, f"vectors/{space}", number, "item_id", head)
        elif name == "pairs":
            slices = _pairs(folder, f"pairs/{space}", number)
        else:
            assert name == encoding_name(layout)
            slices = _dictionary(folder, f"encoding/{space}", number)
        found[name] = (head, slices)
    return found


def _tables(folder: AlGrFolder, part: str, number: int) -> Iterator[pa.Table]:
    for shard in folder.shards(part, number):
        with folder.filesystem.open_input_file(shard) as source:
            file = pq.ParquetFile(source)
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)


def _column(folder: AlGrFolder, part: str, number: int, name: str, head: Header) -> Iterator[Any]:
    for table in _tables(folder, part, number):
        column = table[name].combine_chunks()
        if name == "embedding":
            flat = column.flatten().to_numpy(zero_copy_only=False)
            yield flat.reshape(-1, *head.shape[1:])
        else:
            yield np.asarray(column.to_numpy(zero_copy_only=False), dtype=head.dtype)


def _pairs(folder: AlGrFolder, part: str, number: int) -> Iterator[Any]:
    for table in _tables(folder, part, number):
        columns = [table[name].to_numpy() for name in ("anchor_row", "positive_row")]
        yield np.stack(columns, axis=1)


def _dictionary(folder: AlGrFolder, part: str, number: int) -> Iterator[Any]:
    found: dict[Any, int] = {}
    for table in _tables(folder, part, number):
        ids, rows = table["item_id"].to_pylist(), table["row"].to_pylist()
        found.update(zip(ids, rows, strict=True))
    yield found
