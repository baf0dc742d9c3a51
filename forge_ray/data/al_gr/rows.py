"""The rows of each text layout: text columns in, typed columns and reasons to skip out, and back.

Knows columns, not files. Every typed row writes back to exactly the texts it came from; a row for
which that would not hold is left out with a cause.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from forge_ray.data.al_gr.base64_vectors import decode_vectors, encode_vectors, usual_dim
from forge_ray.data.al_gr.layouts import QUERY_MARK, Layout
from forge_ray.data.al_gr.prompts import Prompts, join_prompts, split_prompts
from forge_ray.data.al_gr.sid_text import SidFormat, join_ids, split_ids
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import matrix
from forge_ray.errors import DataError

CAUSES = {
    "blank_line": "lines with nothing on them but white space and delimiters",
    "wrong_columns": "lines with another number of fields than the header",
    "not_utf8": "lines that are no UTF-8 text",
    "empty_item": "rows with an empty item id",
    "broken_history": "GR rows whose history is not whole SIDs, or stands in two places",
    "broken_answer": "GR rows whose answer is not one SID (train) or a list of items (test)",
    "broken_code": "item-SID cells that are no code of their level",
    "wrong_length": "vectors of another length than most of the file",
    "bad_base64": "vectors that are not canonical base64",
    "not_finite": "vectors with NaN or infinity",
    "no_target": "sequences without a target item",
    "broken_label": "queries whose label is neither 0.0 nor 1.0",
}
_NUMBER = r"^(?:0|[1-9][0-9]{0,8})$"
_LABELS = pa.array(["0.0", "1.0"])


@dataclass(frozen=True)
class Reading:
    """What a file's own lines do not say."""

    sids: SidFormat
    newest_first: bool = True
    """Whether the histories of sequence files begin with the latest item."""


@dataclass(slots=True)
class Rows:
    """Some rows of one file.

    Attributes:
        table: typed columns of all n rows; those of bad rows mean nothing.
        causes: ``[n]`` why a row is left out; empty where it is kept.
        ids: ``[n]`` the row's own id, for the list of rows left out; empty where it has none.
    """

    table: pa.Table
    ids: pa.Array
    causes: NDArray[np.object_] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with every row kept."""
        self.causes = np.full(self.table.num_rows, "", dtype=object)

    def reject(self, cause: str, bad: NDArray[np.bool_]) -> None:
        """Leave rows out; the first cause of a row stands."""
        self.causes[bad & (self.causes == "")] = cause


def blank_rows(texts: Sequence[pa.Array]) -> NDArray[np.bool_]:
    """Rows whose fields are all blank: a blank line reads like one of delimiters alone.

    Args:
        texts: the columns, without nulls.
    """
    found = np.ones(len(texts[0]), dtype=bool)
    for text in texts:
        if found.any():  # mostly the first column tells
            found &= _is_empty(pc.utf8_trim_whitespace(text))
    return found


def settle(layout: Layout, texts: Sequence[pa.Array], reading: Reading) -> Layout:
    """Decide from a file's first rows, at least one and none of them blank, what holds for all."""
    if layout.kind == "gr":
        parsed = reading.sids.parse(texts[-1])
        are_sids = parsed.is_valid & (parsed.codes.lengths > 0)
        return replace(layout, answers="sids" if are_sids.mean() > 0.5 else "items")
    if layout.kind == "item_emb":
        dim = usual_dim(texts[1])
        if not dim:
            raise DataError(
                f"feature must be base64 of float32 numbers, got most rows of another length, the "
                f"first {texts[1][0].as_py()[:40]!r}. Check the column."
            )
        return replace(layout, dim=dim)
    return layout


def decode(layout: Layout, texts: Sequence[pa.Array], reading: Reading) -> Rows:
    """Read the text columns (no nulls) of a settled layout."""
    return _DECODE[layout.kind](layout, texts, reading)


def encode(layout: Layout, table: pa.Table, reading: Reading) -> list[pa.Array]:
    """Write typed rows as text columns; the inverse of `decode`."""
    return _ENCODE[layout.kind](layout, table, reading)


# ---- GR ----


def _decode_gr(layout: Layout, texts: Sequence[pa.Array], reading: Reading) -> Rows:
    system, user, answer = texts[-3:]
    prompts = split_prompts(user, reading.sids)
    columns: dict[str, Any] = {
        "system": system,
        "before": prompts.before,
        "history": prompts.history.to_arrow(),
        "after": prompts.after,
    }
    if layout.answers == "sids":
        parsed = reading.sids.parse(answer)
        columns["answer"] = parsed.codes.to_arrow()
        is_answer = parsed.is_valid & (parsed.codes.lengths == len(reading.sids.sizes))
    else:
        items = split_ids(answer, ";")
        columns["answer_items"] = items
        is_answer = (_lengths(items) > 0) & ~_any_empty(items)
    if len(texts) == 4:
        columns = {"id": texts[0], **columns}
    rows = Rows(pa.table(columns), texts[0] if len(texts) == 4 else _blank(len(user)))
    rows.reject("broken_history", ~prompts.is_valid)
    rows.reject("broken_answer", ~is_answer)
    return rows


def _encode_gr(layout: Layout, table: pa.Table, reading: Reading) -> list[pa.Array]:
    history = Ragged.from_arrow(table["history"])
    parts = Prompts(_flat(table["before"]), history, _flat(table["after"]), np.empty(0, bool))
    if layout.answers == "sids":
        answer = reading.sids.spell(Ragged.from_arrow(table["answer"]))
    else:
        answer = join_ids(_flat(table["answer_items"]), ";")
    first = [_flat(table["id"])] if "id" in table.column_names else []
    return [*first, _flat(table["system"]), join_prompts(parts, reading.sids), answer]


# ---- items ----


def code_columns(levels: int) -> list[str]:
    """Our names of the columns with the codes of an item, whatever the file calls them."""
    return [f"codebook_lv{level}" for level in range(1, levels + 1)]


def _decode_item_sid(layout: Layout, texts: Sequence[pa.Array], reading: Reading) -> Rows:
    bad = np.zeros(len(texts[0]), dtype=bool)
    columns: dict[str, Any] = {"item_id": texts[0]}
    sizes = reading.sids.sizes
    for name, cells, size in zip(code_columns(len(sizes)), texts[1:], sizes, strict=True):
        is_number = pc.match_substring_regex(cells, _NUMBER)
        codes = pc.if_else(is_number, cells, None).cast(pa.int32())
        is_empty = pc.equal(cells, "").to_numpy(zero_copy_only=False)
        is_code = pc.fill_null(pc.less(codes, size), False).to_numpy(zero_copy_only=False)
        bad |= ~is_empty & ~is_code
        columns[name] = codes
    rows = Rows(pa.table(columns), texts[0])
    rows.reject("empty_item", _is_empty(texts[0]))
    rows.reject("broken_code", bad)
    return rows


def _encode_item_sid(layout: Layout, table: pa.Table, reading: Reading) -> list[pa.Array]:
    codes = [table[name].cast(pa.string()) for name in code_columns(len(layout.columns) - 1)]
    return [_flat(table["item_id"]), *(_flat(pc.fill_null(one, "")) for one in codes)]


def _decode_item_emb(layout: Layout, texts: Sequence[pa.Array], reading: Reading) -> Rows:
    ids, features = texts
    found = decode_vectors(features, layout.dim)
    vectors = np.zeros((len(ids), layout.dim), dtype=np.float32)
    vectors[found.is_base64] = found.vectors
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), layout.dim)
    rows = Rows(pa.table({"item_id": ids, "embedding": lists}), ids)
    rows.reject("empty_item", _is_empty(ids))
    rows.reject("wrong_length", ~found.has_length)
    rows.reject("bad_base64", ~found.is_base64)
    rows.reject("not_finite", np.asarray(~np.isfinite(vectors).all(axis=1)))
    return rows


def _encode_item_emb(layout: Layout, table: pa.Table, reading: Reading) -> list[pa.Array]:
    return [_flat(table["item_id"]), encode_vectors(matrix(table["embedding"]))]


# ---- sequences ----


def _decode_sequences(layout: Layout, texts: Sequence[pa.Array], reading: Reading) -> Rows:
    history, targets = split_ids(texts[0], ";"), split_ids(texts[1], ";")
    ordered = _reversed(history) if reading.newest_first else history
    table = pa.table({"history": ordered, "targets": targets})
    rows = Rows(table, _blank(len(texts[0])))
    rows.reject("empty_item", _any_empty(history) | _any_empty(targets))
    rows.reject("no_target", _lengths(targets) == 0)
    return rows


def _encode_sequences(layout: Layout, table: pa.Table, reading: Reading) -> list[pa.Array]:
    history = _flat(table["history"])
    ordered = _reversed(history) if reading.newest_first else history
    return [join_ids(ordered, ";"), join_ids(_flat(table["targets"]), ";")]


def _reversed(lists: pa.ListArray) -> pa.ListArray:
    """Each list from its end to its beginning."""
    lengths = _lengths(lists)
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(lists)), lengths)
    places = (2 * ends - lengths)[row] - 1 - np.arange(len(row))
    offsets = np.concatenate(([0], ends)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), lists.flatten().take(pa.array(places)))


# ---- queries ----


def _decode_queries(layout: Layout, texts: Sequence[pa.Array], reading: Reading) -> Rows:
    (lines,) = texts
    fields = pc.split_pattern(lines, QUERY_MARK)
    has_four = pc.equal(pc.list_value_length(fields), 4).to_numpy(zero_copy_only=False)
    # Lines with other numbers of fields are read as four empty ones, and left out below.
    blank = pa.scalar(["", "", "", ""], fields.type)
    four = pc.if_else(pa.array(has_four), fields, blank).flatten()
    columns = [four.take(pa.array(np.arange(len(lines)) * 4 + number)) for number in range(4)]
    clicked = split_ids(columns[3], ",")
    table = pa.table(
        {
            "list_id": columns[0],
            "label": pc.equal(columns[1], "1.0"),
            "target": columns[2],
            "clicked": clicked,
        }
    )
    rows = Rows(table, columns[0])
    is_label = pc.is_in(columns[1], value_set=_LABELS).to_numpy(zero_copy_only=False)
    rows.reject("wrong_columns", ~has_four)
    rows.reject("broken_label", ~is_label)
    rows.reject("empty_item", _is_empty(columns[2]) | _any_empty(clicked))
    return rows


def _encode_queries(layout: Layout, table: pa.Table, reading: Reading) -> list[pa.Array]:
    label = pc.if_else(_flat(table["label"]), "1.0", "0.0")
    clicked = join_ids(_flat(table["clicked"]), ",")
    fields = [_flat(table["list_id"]), label, _flat(table["target"]), clicked]
    return [pc.binary_join_element_wise(*fields, QUERY_MARK)]


_Decode = Callable[[Layout, Sequence[pa.Array], Reading], Rows]
_Encode = Callable[[Layout, pa.Table, Reading], list[pa.Array]]
_DECODE: dict[str, _Decode] = {
    "gr": _decode_gr,
    "item_sid": _decode_item_sid,
    "item_emb": _decode_item_emb,
    "sequences": _decode_sequences,
    "queries": _decode_queries,
}
_ENCODE: dict[str, _Encode] = {
    "gr": _encode_gr,
    "item_sid": _encode_item_sid,
    "item_emb": _encode_item_emb,
    "sequences": _encode_sequences,
    "queries": _encode_queries,
}


def _is_empty(ids: pa.Array) -> NDArray[np.bool_]:
    return pc.equal(ids, "").to_numpy(zero_copy_only=False)


def _any_empty(ids: pa.ListArray) -> NDArray[np.bool_]:
    """Lists with an empty id among others."""
    found = np.zeros(len(ids), dtype=bool)
    row = np.repeat(np.arange(len(ids)), _lengths(ids))
    found[row[_is_empty(ids.flatten())]] = True
    return found


def _lengths(lists: pa.ListArray) -> NDArray[np.int64]:
    return pc.list_value_length(lists).to_numpy().astype(np.int64)


def _blank(rows: int) -> pa.Array:
    return pa.repeat("", rows)


def _flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
