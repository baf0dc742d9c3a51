"""An import of AL-GR files on disk: which files went in, how far each got, and under which tag.

`al-gr.json` holds the settings and the names of the files, `_files/` the progress of each. Knows
nothing of rows. A file's record is replaced only after what it speaks of is written, so an import
that is killed goes on from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pyarrow import fs as pafs

from forge_ray.artifacts import open_filesystem
from forge_ray.data.al_gr.layouts import Layout
from forge_ray.data.al_gr.rows import Reading
from forge_ray.data.al_gr.sid_text import SidFormat
from forge_ray.errors import DataError

AL_GR_MANIFEST = "al-gr.json"
"""What tells a folder of imported AL-GR files."""
_RECORDS = "_files"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What became of one file.

    Attributes:
        name: path below the source folder.
        fingerprint: name, size and hash.
        layout: the file's, settled once rows were read.
        batches: batches written.
        shards: shards written, of all parts.
        rows: rows written by part.
        skipped: rows left out by cause.
        is_done: whether the whole file is written.
        peak_rss_bytes: most memory of the process that read it.
    """

    name: str
    fingerprint: Mapping[str, Any]
    layout: Layout
    batches: int = 0
    shards: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    is_done: bool = False
    peak_rss_bytes: int = 0

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps({**asdict(self), "layout": self.layout.to_mapping()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> FileRecord:
        """Undo `to_json`."""
        raw = json.loads(text)
        return cls(**{**raw, "layout": Layout.from_mapping(raw["layout"])})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every file of one import shares.

    Attributes:
        version: FORGE's `base` or `final` SIDs.
        codebook_sizes: codes of each level.
        newest_first: whether the histories of sequence files begin with the latest item.
        files: names of the files, in the order of their numbers.
        block_bytes: of text files, read at a time; progress is counted in such blocks.
    """

    version: str
    codebook_sizes: tuple[int, ...]
    newest_first: bool
    files: tuple[str, ...]
    block_bytes: int = 8 * 2**20  # of folders that do not say

    @property
    def reading(self) -> Reading:
        """How the rows are read and written."""
        return Reading(SidFormat(self.codebook_sizes), self.newest_first)


@dataclass(frozen=True)
class AlGrFolder:
    """A folder of imported AL-GR files."""

    filesystem: Any
    root: str

    @classmethod
    def at(cls, uri: str) -> AlGrFolder:
        """The folder at a path or URI, whether an import is there or not."""
        return cls(*open_filesystem(uri))

    def settings(self) -> Settings | None:
        """The settings of the import; None where there is none."""
        text = self._read(AL_GR_MANIFEST)
        if text is None:
            return None
        raw = json.loads(text)
        raw.pop("format")
        sizes, files = tuple(raw["codebook_sizes"]), tuple(raw["files"])
        return Settings(**{**raw, "codebook_sizes": sizes, "files": files})

    def finished(self) -> tuple[Settings, list[FileRecord]]:
        """The settings and records of a complete import.

        Raises:
            DataError: there is no import, or it was interrupted.
        """
        settings = self.settings()
        if settings is None:
            raise DataError(
                f"{self.root} must be an import of AL-GR files, got no {AL_GR_MANIFEST} in it. "
                "Run `forge-ray data import --format al-gr` first."
            )
        records = [self.record(number) for number in range(len(settings.files))]
        missing = [
            name
            for name, one in zip(settings.files, records, strict=True)
            if one is None or not one.is_done
        ]
        if missing:
            raise DataError(
                f"{self.root} must be a complete import, got {len(missing)} unfinished files "
                f"(first: {missing[0]}). Run the same import again; it goes on where it stopped."
            )
        return settings, [one for one in records if one is not None]

    def save(self, settings: Settings) -> None:
        """Write the settings."""
        plain = {"format": "al-gr", **asdict(settings)}
        self._write(AL_GR_MANIFEST, json.dumps(plain, indent=1, ensure_ascii=False))

    def record(self, number: int) -> FileRecord | None:
        """The record of a file; None before its first shard."""
        text = self._read(f"{_RECORDS}/{number:05d}.json")
        return None if text is None else FileRecord.from_json(text)

    def save_record(self, number: int, record: FileRecord) -> None:
        """Replace the record of a file."""
        self._write(f"{_RECORDS}/{number:05d}.json", record.to_json())

    def shards(self, part: str, number: int) -> list[str]:
        """Paths of a file's shards in one part, in order."""
        selector = pafs.FileSelector(f"{self.root}/{part}", allow_not_found=True)
        prefix = f"part-{number:05d}-"
        found = self.filesystem.get_file_info(selector)
        return sorted(one.path for one in found if one.base_name.startswith(prefix))

    def shard_path(self, part: str, number: int, shard: int) -> str:
        """Where a shard goes; its folder exists afterwards."""
        self.filesystem.create_dir(f"{self.root}/{part}", recursive=True)
        return f"{self.root}/{part}/part-{number:05d}-{shard:05d}.parquet"

    def _read(self, name: str) -> str | None:
        path = f"{self.root}/{name}"
        if self.filesystem.get_file_info(path).type == pafs.FileType.NotFound:
            return None
        with self.filesystem.open_input_file(path) as stream:
            return stream.read().decode()

    def _write(self, name: str, text: str) -> None:
        path = f"{self.root}/{name}"
        self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        # Never half a record: on a disk the rename is atomic, on an object store the write is.
        with self.filesystem.open_output_stream(f"{path}.new") as stream:
            stream.write(text.encode())
        self.filesystem.move(f"{path}.new", path)


def import_above(uri: str) -> AlGrFolder | None:
    """The import that a file or folder lies in; None where it lies in none.

    Args:
        uri: an input of `data prepare`, at most two folders below the import's.
    """
    base, mark, options = uri.partition("?")
    scheme, separator, path = base.rstrip("/").rpartition("://")
    for parents in (1, 2):
        above = path.rsplit("/", parents)
        if len(above) <= parents or not above[0]:
            break
        folder = AlGrFolder.at(f"{scheme}{separator}{above[0]}{mark}{options}")
        if folder.settings() is not None:
            return folder
    return None


def number_in(shard: str) -> int | None:
    """Number of the file whose rows a shard of that name holds; undoes `AlGrFolder.shard_path`.

    None for a name that no shard of an import has.
    """
    found = re.fullmatch(r"part-(\d{5})-\d{5}\.parquet", shard)
    return None if found is None else int(found[1])


def skipped_in_all(records: Sequence[FileRecord]) -> dict[str, int]:
    """Rows left out of all files, by cause."""
    return _sum([one.skipped for one in records])


def rows_in_all(records: Sequence[FileRecord]) -> dict[str, int]:
    """Rows written of all files, by part."""
    return _sum([one.rows for one in records])


def numbered_spaces(records: Sequence[FileRecord]) -> list[str]:
    """Names of the vector spaces whose ids are no items.

    Item-EMB files name items; `.npz` files of SID training have numbers of rows for ids.
    """
    named: set[str] = set()
    others: set[str] = set()
    for one in records:
        found = {part.partition("/")[2] for part in one.rows if part.startswith("vectors/")}
        (named if one.layout.kind == "item_emb" else others).update(found)
    return sorted(others - named)


def _sum(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))
