"""Import of AL-GR files: each becomes Parquet shards, one task per file, in bounded memory.

A file is read some megabytes at a time and its progress recorded after every shard: the same
command goes on where it stopped, and takes files that are new. Rows that do not fit the layout are
left out, counted by cause and kept as text under `rejects/`. Ray must be running.
"""

from __future__ import annotations

import resource
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from forge_ray.artifacts import open_filesystem
from forge_ray.data import tasks
from forge_ray.data.al_gr.archives import read_archive
from forge_ray.data.al_gr.folder import (
    AlGrFolder,
    FileRecord,
    Settings,
    rows_in_all,
    skipped_in_all,
)
from forge_ray.data.al_gr.layouts import Layout, encoding_name, find_layout
from forge_ray.data.al_gr.sid_text import SidFormat
from forge_ray.data.al_gr.text_files import BLOCK_BYTES, Batch, read_text
from forge_ray.data.importers import RawFile, fingerprint
from forge_ray.errors import ConfigError, DataError

SHARD_BATCHES = 64
_DONE = pa.schema({"number": pa.int64()})
_PARTS = {
    "gr": "gr",
    "item_sid": "items",
    "item_emb": "vectors/default",
    "sequences": "sequences",
    "queries": "queries",
}


@dataclass(kw_only=True)
class AlGrImportConfig:
    """Which AL-GR files to import, and what they do not say themselves."""

    source: str = ""
    """A file, or a folder whose files are found at any depth."""
    output: str = ""
    """Folder to write to: new, or one that the same import began."""
    version: Literal["", "base", "final"] = ""
    """Which of FORGE's two sets of SIDs the files belong to: `base` are AL-GR and Item-SID/base,
    `final` AL-GR-v1, AL-GR-Tiny, Item-SID/final and Item-EMB. No file says it, and mixing them is
    the first cause of a hit rate near 0 (issue 27 of FORGE's code)."""
    codebook_sizes: list[int] = field(default_factory=lambda: [8192, 8192, 8192])
    """Codes of each level; the default is AL-GR's."""
    newest_first: bool = True
    """Whether the histories of `user_history,target_item` files begin with the latest item, as
    FORGE's baselines assume of the published ones."""
    allow_pickle: bool = False
    """Read the pickled dictionary of contrastive `.npz` files; numbers and strings only."""

    def __post_init__(self) -> None:
        """Check what is required."""
        for name, what in (("source", "a file or folder"), ("output", "a folder")):
            if not getattr(self, name):
                raise ConfigError(f"{name} must name {what}, got none. Add {name}=path.")
        if not self.version:
            raise ConfigError(
                "version must be base or final, got none. Add version=final for AL-GR-v1, "
                "AL-GR-Tiny, Item-SID/final and Item-EMB; version=base for AL-GR and Item-SID/base."
            )
        SidFormat(tuple(self.codebook_sizes))


@dataclass(frozen=True, slots=True)
class AlGrReport:
    """What an import did, all runs of it together.

    Attributes:
        directory: the folder written.
        version: its tag.
        files: layout by file.
        rows: rows written by part.
        skipped: rows left out by cause; their texts are under `rejects/`.
        ignored: files below the source that have none of AL-GR's layouts.
        peak_rss_bytes: most memory of a process that read a file.
    """

    directory: str
    version: str
    files: dict[str, str]
    rows: dict[str, int]
    skipped: dict[str, int]
    ignored: list[str]
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class _Source:
    """The files found: path by name, and what is known of each before its rows are read."""

    filesystem: Any
    paths: dict[str, str]
    records: dict[str, FileRecord]
    ignored: list[str]


def import_al_gr(config: AlGrImportConfig) -> AlGrReport:
    """Import all files below a folder, or go on with it.

    Raises:
        ConfigError: the output holds another version, other codebooks or other histories.
        DataError: no file has a known layout, or one changed since it was imported.
    """
    source = _find(config)
    folder = AlGrFolder.at(config.output)
    settings = _join(folder, config, source)
    numbers = [
        number
        for number, name in enumerate(settings.files)
        if name in source.records and _is_open(folder, number, source.records[name])
    ]
    done = tasks.for_each(
        numbers,
        _import_file,
        folder=folder,
        settings=settings,
        source=source,
        allow_pickle=config.allow_pickle,
    )
    tasks.results(done)
    records = [one for n in range(len(settings.files)) if (one := folder.record(n)) is not None]
    return AlGrReport(
        directory=config.output,
        version=settings.version,
        files={one.name: one.layout.kind for one in records},
        rows=rows_in_all(records),
        skipped=skipped_in_all(records),
        ignored=source.ignored,
        peak_rss_bytes=max((one.peak_rss_bytes for one in records), default=0),
    )


def _find(config: AlGrImportConfig) -> _Source:
    filesystem, root = open_filesystem(config.source)
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"source must exist, got {config.source}. Check the path.")
    is_file = info.type == pafs.FileType.File
    base = root.rpartition("/")[0] if is_file else root
    found = [info] if is_file else filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    source = _Source(filesystem, {}, {}, [])
    for one in sorted(found, key=lambda entry: entry.path):
        name = one.path.removeprefix(f"{base}/")
        if one.type != pafs.FileType.File or any(p[:1] in "._" for p in name.split("/")):
            continue
        layout = find_layout(filesystem, one.path)
        if layout is None:
            source.ignored.append(name)
            continue
        raw = RawFile(_uri(config.source, root, one.path), "csv", 0, one.size)
        source.paths[name] = one.path
        source.records[name] = FileRecord(name=name, fingerprint=fingerprint(raw), layout=layout)
        _check(name, layout, config)
    if not source.records:
        raise DataError(
            f"source must hold files in one of AL-GR's layouts, got {source.ignored or 'none'} in "
            f"{config.source}. docs/al-gr.md lists the layouts by their first lines."
        )
    return source


def _uri(root_uri: str, root: str, path: str) -> str:
    base, mark, options = root_uri.partition("?")
    return f"{base.removesuffix(root)}{path}{mark}{options}" if "://" in base else path


def _check(name: str, layout: Layout, config: AlGrImportConfig) -> None:
    if layout.kind == "item_emb" and config.version == "base":
        raise ConfigError(
            f"version must be final for {name}, got base: FORGE published no vectors of the base "
            "SIDs' items. Import it with version=final, into a folder of its own."
        )
    if layout.kind == "pairs_npz" and not config.allow_pickle:
        raise ConfigError(
            f"allow_pickle must be true to read {encoding_name(layout)} of {name}: it is a pickled "
            "dict. Set allow_pickle=true for files that you trust."
        )
    levels = len(layout.columns) - 1
    if layout.kind == "item_sid" and levels != len(config.codebook_sizes):
        raise ConfigError(
            f"codebook_sizes must name the {levels} levels of {name}, got {config.codebook_sizes}. "
            "Set codebook_sizes=[…], one number per column of codes."
        )


def _join(folder: AlGrFolder, config: AlGrImportConfig, source: _Source) -> Settings:
    """The settings of the output folder with the new files in them, after the checks."""
    ours = Settings(
        version=config.version,
        codebook_sizes=tuple(config.codebook_sizes),
        newest_first=config.newest_first,
        files=tuple(source.records),
        block_bytes=BLOCK_BYTES,
    )
    before = folder.settings()
    if before is None:
        _require_empty(folder)
        folder.save(ours)
        return ours
    for name in ("version", "codebook_sizes", "newest_first"):
        old, new = getattr(before, name), getattr(ours, name)
        if old != new:
            raise ConfigError(
                f"{name} must be {old} as that of the files in {folder.root}, got {new}. "
                "Import into another folder: SIDs of two kinds do not mix."
            )
    joined = replace(before, files=tuple(dict.fromkeys([*before.files, *ours.files])))
    folder.save(joined)
    return joined


def _require_empty(folder: AlGrFolder) -> None:
    selector = pafs.FileSelector(folder.root, allow_not_found=True)
    entries = folder.filesystem.get_file_info(selector)
    if entries:
        raise DataError(
            f"output must be a new or empty folder, or an import of AL-GR files, got {folder.root} "
            f"with {len(entries)} entries. Choose another folder, or delete this one."
        )


def _is_open(folder: AlGrFolder, number: int, found: FileRecord) -> bool:
    record = folder.record(number)
    if record is None:
        return True
    if dict(record.fingerprint) != dict(found.fingerprint):
        raise DataError(
            f"{record.name} must be the file that {folder.root} was begun with, got other content. "
            "Import the changed file into another folder."
        )
    return not record.is_done


def _import_file(
    number: int, *, folder: AlGrFolder, settings: Settings, source: _Source, allow_pickle: bool
) -> Iterator[pa.Table]:
    name = settings.files[number]
    record = folder.record(number) or source.records[name]
    with source.filesystem.open_input_file(source.paths[name]) as stream:
        batches = _read(stream, record, settings, allow_pickle=allow_pickle)
        record = _write_all(folder, number, record, batches)
    folder.save_record(number, replace(record, is_done=True))
    yield pa.table({"number": [number]}, schema=_DONE)


def _read(
    stream: Any, record: FileRecord, settings: Settings, *, allow_pickle: bool
) -> Iterator[Batch]:
    layout = record.layout
    try:
        if not layout.is_text:
            yield from _archive(stream, record, allow_pickle=allow_pickle)
            return
        yield from read_text(
            stream,
            layout,
            settings.reading,
            name=record.name,
            skip=record.batches,
            block_bytes=settings.block_bytes,
            part=_PARTS[layout.kind],
        )
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{record.name} must be whole lines of {list(layout.columns)}, got a line that Arrow "
            f"cannot end: {' '.join(str(error).split())[:200]}. Look for an open quote."
        ) from error


def _archive(stream: Any, record: FileRecord, *, allow_pickle: bool) -> Iterator[Batch]:
    space = record.name.rpartition("/")[2].rpartition(".")[0]
    try:
        yield from read_archive(
            stream, record.layout, space=space, skip=record.batches, allow_pickle=allow_pickle
        )
    except DataError as error:
        raise DataError(f"{record.name}: {error}") from error
    except (zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise DataError(
            f"{record.name} must hold the arrays that its names promise, got: {error}. Check the "
            "file, or copy it again."
        ) from error


def _write_all(
    folder: AlGrFolder, number: int, record: FileRecord, batches: Iterator[Batch]
) -> FileRecord:
    """Write batches as shards of at most `SHARD_BATCHES`, the record after each."""
    group: list[Batch] = []
    writer = _ShardWriter(folder, number)
    for batch in batches:
        if group and (len(group) == SHARD_BATCHES or group[0].part != batch.part):
            record = writer.close(record, group)
            group = []
        writer.add(batch, record.shards)
        # A slice of no rows would keep the rows in memory.
        group.append(replace(batch, table=batch.table.schema.empty_table()))
    return writer.close(record, group) if group else record


class _ShardWriter:
    """Writes the batches of one shard as they come; only the last one is in memory."""

    def __init__(self, folder: AlGrFolder, number: int) -> None:
        self._folder = folder
        self._number = number
        self._rows = 0
        self._writer: Any = None

    def add(self, batch: Batch, shard: int) -> None:
        """Append rows; the first ones open the shard."""
        if not batch.table.num_rows:
            return
        if self._writer is None:
            path = self._folder.shard_path(batch.part, self._number, shard)
            self._writer = pq.ParquetWriter(
                path, batch.table.schema, filesystem=self._folder.filesystem, compression="zstd"
            )
        self._writer.write_table(batch.table)
        self._rows += batch.table.num_rows

    def close(self, record: FileRecord, group: Sequence[Batch]) -> FileRecord:
        """End the shard, write the rows left out beside it, and record both."""
        if self._writer is not None:
            self._writer.close()
        rejects = pa.concat_tables([one.rejects for one in group])
        if rejects.num_rows:
            path = self._folder.shard_path("rejects", self._number, record.shards)
            tasks.write_shard(rejects, path, self._folder.filesystem)
        causes = Counter(rejects["cause"].to_pylist())
        part = group[0].part
        updated = replace(
            record,
            layout=group[-1].layout,  # blank lines before the first row leave it open
            batches=record.batches + len(group),
            shards=record.shards + 1,
            rows=dict(Counter(record.rows) + Counter({part: self._rows})),
            skipped=dict(Counter(record.skipped) + causes),
            peak_rss_bytes=max(record.peak_rss_bytes, _peak_rss_bytes()),
        )
        self._folder.save_record(self._number, updated)
        self._writer, self._rows = None, 0
        return updated


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
