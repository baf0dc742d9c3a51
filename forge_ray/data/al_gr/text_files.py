"""Delimited text read as a stream of typed batches with their row numbers, and written as lines.

A batch is some megabytes of the file, whatever the file's size; batches fall on the same rows at
every reading, so a reader may pass over those that were taken before.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from forge_ray.data.al_gr.layouts import Layout
from forge_ray.data.al_gr.rows import Reading, Rows, blank_rows, decode, settle
from forge_ray.errors import DataError

# Arrow reads up to 32 blocks ahead: 64 MiB of a file, however fast they are taken.
BLOCK_BYTES = 2 * 2**20
_LINE = "line"
# Stray bytes 0x80 to 0xFF travel through Arrow as the last characters for private use.
_STRAY = 0x10FF00
_STRAYS = f"[{chr(_STRAY + 0x80)}-{chr(_STRAY + 0xFF)}]"
REJECTS_SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "row": pa.int64(),
        "id": pa.string(),
        "cause": pa.string(),
        "text": pa.string(),
    }
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Some consecutive rows of one file.

    Attributes:
        layout: the file's, settled.
        part: folder of the import that these rows go to.
        table: typed rows.
        rejects: rows left out, columns of `REJECTS_SCHEMA`.
    """

    layout: Layout
    part: str
    table: pa.Table
    rejects: pa.Table


@dataclass(slots=True)
class _Lines:
    """Which lines of the file the reader's rows are: it drops lines of another width.

    Attributes:
        dropped: lines the reader dropped and no batch has reported yet: number and text.
        next: number of the next line, counted from 1, the header not counted.
    """

    has_header: bool
    dropped: list[tuple[int, str]] = field(default_factory=list)
    next: int = 1

    def drop(self, row: Any) -> str:
        """Called by Arrow for each line of another width."""
        self.dropped.append((row.number - self.has_header, _spell_strays(row.text)))
        return "skip"

    def take(self, rows: int, *, last: bool = False) -> tuple[NDArray[np.int64], list[Any]]:
        """Numbers of the next rows, and the lines dropped between them."""
        self.dropped.sort()
        numbers = np.arange(self.next, self.next + rows + len(self.dropped))
        kept = numbers[~np.isin(numbers, [number for number, _ in self.dropped])][:rows]
        end = int(kept[-1]) if rows else self.next - 1
        gone = [one for one in self.dropped if last or one[0] < end]
        self.dropped = self.dropped[len(gone) :]
        self.next = max(end, gone[-1][0] if gone else 0) + 1
        return kept, gone


def read_text(
    source: Any,
    layout: Layout,
    reading: Reading,
    *,
    name: str,
    block_bytes: int,
    skip: int = 0,
    part: str,
) -> Iterator[Batch]:
    """Stream a file's rows.

    Args:
        source: the open file.
        layout: of the file; settled on the first batch with a row that is not blank.
        reading: what the file does not say.
        name: the file's, for rejects.
        block_bytes: read at a time. A batch is a block, so passing over some needs the same size.
        skip: batches to pass over, as taken before.
        part: where the rows go.

    Raises:
        DataError: a quote that was opened runs over whole rows.
    """
    lines = _Lines(has_header=bool(layout.columns))
    is_settled = False
    for number, batch in enumerate(_open(source, layout, lines, block_bytes)):
        # A layout depends on the first rows alone, so a resumed reading needs them again.
        fields = _fields(batch)
        if len(fields.not_utf8) and not is_settled:
            layout, is_settled = settle(layout, fields.texts, reading), True
        numbers, gone = lines.take(batch.num_rows)
        if number >= skip:
            yield _batch(layout, fields, reading, name=name, numbers=numbers, gone=gone, part=part)
    _, gone = lines.take(0, last=True)
    if gone:
        rejects = _rejects(name, [], None, [], _left_out(gone, layout), layout)
        _check_quotes(rejects, layout)
        yield Batch(layout, part, pa.table({}), rejects)


def _batch(
    layout: Layout,
    fields: _Fields,
    reading: Reading,
    *,
    name: str,
    numbers: NDArray[np.int64],
    gone: Sequence[tuple[int, str]],
    part: str,
) -> Batch:
    """The rows of a batch, typed; blank ones are never decoded."""
    blanks = zip(numbers[fields.is_blank].tolist(), fields.blanks(layout), strict=True)
    others = [*_left_out(gone, layout), *((row, "blank_line", text) for row, text in blanks)]
    rows = None
    if len(fields.not_utf8):  # before there is such a row, the layout may be open
        rows = decode(layout, fields.texts, reading)
        rows.causes[fields.not_utf8] = "not_utf8"
    rejects = _rejects(name, numbers[~fields.is_blank], rows, fields.texts, others, layout)
    _check_quotes(rejects, layout)
    kept = pa.table({}) if rows is None else rows.table.filter(pa.array(rows.causes == ""))
    return Batch(layout, part, kept, rejects)


def _left_out(gone: Sequence[tuple[int, str]], layout: Layout) -> list[tuple[int, str, str]]:
    """Number, cause and text of lines that Arrow dropped."""
    return [
        (row, "blank_line" if _is_blank(text, layout) else "wrong_columns", text)
        for row, text in gone
    ]


def _is_blank(text: str, layout: Layout) -> bool:
    return not text.replace(layout.delimiter, " ").replace('""', " ").strip()


def _check_quotes(rejects: pa.Table, layout: Layout) -> None:
    """A row left out must not hide others: those behind a quote that nobody closed."""
    for reject in rejects.filter(pc.match_substring(rejects["text"], "\n")).to_pylist():
        behind = reject["text"].split("\n")[1:]
        if any(_is_row(line, layout) for line in behind):
            raise DataError(
                f"{reject['file']} row {reject['row']}: fields in quotes must end in their row, "
                f"got {len(behind)} more lines within it. Close the quote, or remove it."
            )


def _is_row(line: str, layout: Layout) -> bool:
    if len(line) >= csv.field_size_limit():  # longer than the reader takes
        return line.count(layout.delimiter) + 1 == len(layout.columns)
    row = next(csv.reader([line], delimiter=layout.delimiter), [])
    return len(row) == len(layout.columns)


class _Utf8(io.RawIOBase):
    """A file as UTF-8, its stray bytes as characters for private use.

    Arrow decodes a line of another width before anybody may drop it, and ends there otherwise.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-8")(_STRAY_ERRORS)
        self._ready = b""

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size`."""
        while len(self._ready) < size:
            raw = self._source.read(size)
            self._ready += self._decoder.decode(raw, final=not raw).encode()
            if not raw:
                break
        out, self._ready = self._ready[:size], self._ready[size:]
        return out


def _as_private(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    stray = error.object[error.start : error.end]
    return "".join(chr(_STRAY + byte) for byte in stray), error.end


_STRAY_ERRORS = "forge_ray_stray"
codecs.register_error(_STRAY_ERRORS, _as_private)


def _spell_strays(text: str) -> str:
    return "".join(f"\\x{ord(c) - _STRAY:02x}" if ord(c) >= _STRAY + 0x80 else c for c in text)


def _open(source: Any, layout: Layout, lines: _Lines, block_bytes: int) -> Iterator[pa.RecordBatch]:
    names = list(layout.columns) or [_LINE]
    parse = pacsv.ParseOptions(
        delimiter=layout.delimiter,
        quote_char='"' if layout.columns else False,
        newlines_in_values=bool(layout.columns),
        ignore_empty_lines=False,
        invalid_row_handler=lines.drop,
    )
    # One thread: only then does Arrow number the lines that it drops.
    read = pacsv.ReadOptions(
        block_size=block_bytes,
        use_threads=False,
        column_names=names,
        skip_rows=1 if layout.columns else 0,
    )
    convert = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    whole = pa.PythonFile(_Utf8(source), mode="r")
    yield from pacsv.open_csv(
        whole, read_options=read, parse_options=parse, convert_options=convert
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """A batch as Arrow read it.

    Attributes:
        texts: the columns of the m rows that are not blank.
        not_utf8: [m], rows that are no text; their stray bytes are escaped.
        is_blank: [n], of all rows.
        blank: the columns of the other rows.
    """

    texts: list[pa.Array]
    not_utf8: NDArray[np.bool_]
    is_blank: NDArray[np.bool_]
    blank: list[pa.Array]

    def blanks(self, layout: Layout) -> list[str]:
        """The blank rows as text: no delimiters where no field has anything, not even a space."""
        whole = spell_lines(self.blank, layout).to_pylist()
        is_bare = pc.equal(pc.binary_join_element_wise(*self.blank, ""), "").to_pylist()
        return ["" if bare else text for bare, text in zip(is_bare, whole, strict=True)]


def _fields(batch: pa.RecordBatch) -> _Fields:
    texts, not_utf8 = _texts(batch)
    is_blank = blank_rows(texts)
    if not is_blank.any():
        return _Fields(texts, not_utf8, is_blank, [text.slice(0, 0) for text in texts])
    blank, rest = pa.array(is_blank), pa.array(~is_blank)
    return _Fields(
        [text.filter(rest) for text in texts],
        not_utf8[~is_blank],
        is_blank,
        [text.filter(blank) for text in texts],
    )


def _texts(batch: pa.RecordBatch) -> tuple[list[pa.Array], NDArray[np.bool_]]:
    """The columns as text, and the rows that are none, with their stray bytes escaped."""
    bad = np.zeros(batch.num_rows, dtype=bool)
    texts = list(batch.columns)
    for number, text in enumerate(texts):
        strays = pc.match_substring_regex(text, _STRAYS).to_numpy(zero_copy_only=False)
        if strays.any():
            bad |= strays
            texts[number] = pa.array([_spell_strays(one) for one in text.to_pylist()], pa.string())
    return texts, bad


def _rejects(
    name: str,
    numbers: Any,
    rows: Rows | None,
    texts: Sequence[pa.Array],
    others: Sequence[tuple[int, str, str]],
    layout: Layout,
) -> pa.Table:
    """The rows left out, in file order, `others` among them: numbers, ids, causes and texts."""
    ours: list[dict[str, Any]] = [
        {"row": row, "id": "", "cause": cause, "text": text} for row, cause, text in others
    ]
    if rows is not None:
        places = np.flatnonzero(rows.causes != "")
        whole = spell_lines([text.take(pa.array(places)) for text in texts], layout)
        for place, text in zip(places.tolist(), whole.to_pylist(), strict=True):
            ours.append(
                {
                    "row": int(numbers[place]),
                    "id": rows.ids[place].as_py(),
                    "cause": rows.causes[place],
                    "text": text,
                }
            )
    found = [{"file": name, **one} for one in sorted(ours, key=lambda one: one["row"])]
    return pa.Table.from_pylist(found, schema=REJECTS_SCHEMA)


def header_line(layout: Layout) -> bytes:
    """The first line of a file, with its byte order mark; empty where the layout has none."""
    start = b"\xef\xbb\xbf" if layout.bom else b""
    if not layout.columns:
        return start
    fields = [pa.array([name]) for name in layout.columns]
    return start + spell_lines(fields, layout)[0].as_py().encode() + layout.eol.encode()


def spell_lines(fields: Sequence[pa.Array], layout: Layout) -> pa.Array:
    """Join text columns to lines without their ends, in quotes where the layout or a field asks."""
    if not layout.columns:
        return fields[0]
    return pc.binary_join_element_wise(*(_quote(one, layout) for one in fields), layout.delimiter)


def _quote(texts: pa.Array, layout: Layout) -> pa.Array:
    if not layout.quoted:
        needs = pc.match_substring_regex(texts, f'[{layout.delimiter}"\r\n]')
        if not pc.any(needs).as_py():
            return texts
    else:
        needs = pa.scalar(True)
    doubled = pc.replace_substring(texts, '"', '""')
    return pc.if_else(needs, pc.binary_join_element_wise('"', doubled, '"', ""), texts)


def joined(lines: pa.Array, layout: Layout) -> bytes:
    """All lines with their ends, as bytes."""
    ended = pc.binary_join_element_wise(lines, layout.eol, "")
    whole = pa.ListArray.from_arrays(pa.array([0, len(ended)], pa.int32()), ended)
    return pc.binary_join(whole, "")[0].as_py().encode()
