"""Which of AL-GR's layouts a file has, and the details that writing it back needs.

Decided from the name's ending, the first line or the names of the arrays, never from the path: the
published headers vary, and so do the delimiters.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pyarrow import fs as pafs

from forge_ray.data.al_gr.npz import Header, header
from forge_ray.data.al_gr.sid_text import level_names
from forge_ray.errors import DataError

Kind = Literal["gr", "item_sid", "item_emb", "sequences", "queries", "pairs_npz", "vectors_npz"]
TEXT_KINDS: tuple[Kind, ...] = ("gr", "item_sid", "item_emb", "sequences", "queries")
QUERY_MARK = "||$$||"
NO_DELIMITER = "\x01"
_HEAD_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
_ENCODINGS = ("itemEncID", "itemEncId")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One file's layout.

    Attributes:
        kind: what the rows are.
        columns: names in the header; arrays of an `.npz`, in their order.
        delimiter: between two fields.
        eol: end of a line.
        final_eol: whether the last line has one; known once the file is read.
        quoted: whether every field is in quotes, and not only those that need them.
        bom: whether the file begins with a byte order mark.
        answers: of GR rows, `sids` (train) or `items` (test); known from the first rows.
        dim: width of the vectors; known from the first rows.
        arrays: of an `.npz`, shape and type of each array.
    """

    kind: Kind
    columns: tuple[str, ...]
    delimiter: str = ","
    eol: str = "\n"
    final_eol: bool = True
    quoted: bool = False
    bom: bool = False
    answers: str = ""
    dim: int = 0
    arrays: Mapping[str, Header] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        """Whether the file is read as lines."""
        return self.kind in TEXT_KINDS

    def to_mapping(self) -> dict[str, Any]:
        """The layout as JSON types."""
        arrays = {name: [list(one.shape), one.dtype.str] for name, one in self.arrays.items()}
        plain = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {**plain, "columns": list(self.columns), "arrays": arrays}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Layout:
        """Undo `to_mapping`."""
        arrays = {
            name: Header(tuple(shape), np.dtype(dtype))
            for name, (shape, dtype) in mapping["arrays"].items()
        }
        return cls(**{**mapping, "columns": tuple(mapping["columns"]), "arrays": arrays})


def find_layout(filesystem: pafs.FileSystem, path: str) -> Layout | None:
    """Look at the beginning of a file.

    Args:
        filesystem: where it is.
        path: its path there.

    Returns:
        The layout; None if it is none of AL-GR's.

    Raises:
        DataError: the file is an `.npz` that cannot be read.
    """
    name = path.rsplit("/", 1)[-1].lower()
    with filesystem.open_input_file(path) as source:
        if name.endswith(".npz"):
            return _npz_layout(path, source)
        if not name.endswith((".csv", ".tsv", ".txt")):
            return None
        head = source.read(_HEAD_BYTES)
        size = source.size()
        end = source.read_at(2, max(size - 2, 0)) if size else b""
    return _text_layout(head, final_eol=end.endswith(b"\n"))


def _npz_layout(path: str, source: Any) -> Layout | None:
    try:
        with zipfile.ZipFile(source) as archive:
            names = tuple(name.removesuffix(".npy") for name in archive.namelist())
            kind = _npz_kind(names)
            if kind is None:
                return None
            arrays = {name: header(archive, name) for name in names}
    except (zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise DataError(
            f"{path} must be a complete .npz file, got: {error}. Copy the file again."
        ) from error
    return Layout(kind=kind, columns=names, arrays=arrays)


def _npz_kind(names: Sequence[str]) -> Kind | None:
    if {"pairs", "embeds"} <= set(names) and any(one in names for one in _ENCODINGS):
        return "pairs_npz"
    return "vectors_npz" if {"ids", "embeds"} == set(names) else None


def encoding_name(layout: Layout) -> str:
    """The array of a pairs file that maps ids to rows; it is spelled in two ways."""
    return next(name for name in layout.columns if name in _ENCODINGS)


def _text_layout(head: bytes, *, final_eol: bool) -> Layout | None:
    bom = head.startswith(_BOM)
    first, newline, _ = head.removeprefix(_BOM).partition(b"\n")
    if b"\0" in first:
        return None
    line = first.removesuffix(b"\r").decode("utf-8", errors="replace")
    eol = "\r\n" if newline and first.endswith(b"\r") else "\n"
    shared: dict[str, Any] = {"eol": eol, "final_eol": final_eol, "bom": bom}
    if line.count(QUERY_MARK) == 3:
        return Layout(kind="queries", columns=(), delimiter=NO_DELIMITER, **shared)
    delimiter = "\t" if "\t" in line else ","
    quoted = line.startswith('"')
    columns = tuple(name.strip('"') for name in line.split(delimiter))
    kind = _csv_kind(columns)
    if kind is None:
        return None
    return Layout(kind=kind, columns=columns, delimiter=delimiter, quoted=quoted, **shared)


def _csv_kind(columns: Sequence[str]) -> Kind | None:
    if tuple(columns[-3:]) == ("system", "user", "answer") and len(columns) <= 4:
        return "gr"
    if tuple(columns) == ("user_history", "target_item"):
        return "sequences"
    if len(columns) == 2 and columns[1] == "feature":
        return "item_emb"
    return "item_sid" if level_names(columns) else None
