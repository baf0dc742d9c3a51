"""Whatever a field holds, a row that is kept is spelled back exactly, and others have a cause."""

from __future__ import annotations

import io
from dataclasses import replace
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forge_ray.data.al_gr.base64_vectors import decode_vectors, encode_vectors
from forge_ray.data.al_gr.layouts import Layout
from forge_ray.data.al_gr.prompts import join_prompts, split_prompts
from forge_ray.data.al_gr.rows import Reading, encode
from forge_ray.data.al_gr.sid_text import SidFormat, join_ids, split_ids
from forge_ray.data.al_gr.text_files import Batch, header_line, joined, read_text, spell_lines
from forge_ray.errors import DataError

FORMAT = SidFormat((4, 5, 6))
# Letters that the layouts give a meaning, and some prose.
TEXT = st.text('C0123456789;,"\t |$=+/ab当', max_size=25)
CODES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)), max_size=4)
READING = Reading(FORMAT)


def spelled(codes: list[tuple[int, int, int]]) -> str:
    return "".join(f"C{a}C{b + 4}C{c + 9}" for a, b, c in codes)


@given(st.lists(st.one_of(TEXT, CODES.map(spelled)), max_size=8))
def test_a_text_is_sids_only_if_spelling_gives_it_back(texts: list[str]) -> None:
    parsed = FORMAT.parse(pa.array(texts, pa.string()))
    again = FORMAT.spell(parsed.codes).to_pylist()
    for text, valid, back in zip(texts, parsed.is_valid, again, strict=True):
        assert back == (text if valid else "")
    tokens = {f"C{a}C{b}C{c}" for a in range(4) for b in range(4, 9) for c in range(9, 15)}
    for text, valid in zip(texts, parsed.is_valid, strict=True):
        assert valid == _is_made_of(text, tokens)


def _is_made_of(text: str, tokens: set[str]) -> bool:
    if not text:
        return True
    return any(text.startswith(one) and _is_made_of(text[len(one) :], tokens) for one in tokens)


@given(st.lists(st.tuples(TEXT, CODES, TEXT), min_size=1, max_size=8))
def test_prompts_come_back(rows: list[tuple[str, list[tuple[int, int, int]], str]]) -> None:
    users = pa.array([before + spelled(codes) + after for before, codes, after in rows])
    found = split_prompts(users, FORMAT)
    again = join_prompts(found, FORMAT).to_pylist()
    for user, valid, back in zip(users.to_pylist(), found.is_valid, again, strict=True):
        assert back == user or not valid


# Rows that begin and end alike, some with more prose or another token inside.
PROSE = st.sampled_from(["历史：", "历史：（搜索：裙子）", "历史：C3 ", ""])
ENDS = st.sampled_from(["，请", "，（搜索）C9，请", "C0C4C9，请", ""])


@example([("历史：", [(1, 1, 1)], "，请"), ("历史：", [], "，请")], Random(0))
@given(st.lists(st.tuples(PROSE, CODES, ENDS), min_size=1, max_size=6), st.randoms())
def test_what_is_read_of_a_prompt_does_not_hang_on_the_row_that_comes_first(
    rows: list[tuple[str, list[tuple[int, int, int]], str]], random: Random
) -> None:
    texts = [before + spelled(codes) + after for before, codes, after in rows]
    found = split_prompts(pa.array(texts), FORMAT)
    alone = [split_prompts(pa.array([text]), FORMAT) for text in texts]
    assert found.is_valid.tolist() == [one.is_valid[0] for one in alone]
    for place, one in enumerate(alone):
        assert found.before[place] == one.before[0]
        assert found.history.row(place).tolist() == one.history.row(0).tolist()
        assert found.after[place] == one.after[0]
    order = random.sample(range(len(texts)), len(texts))
    again = split_prompts(pa.array([texts[place] for place in order]), FORMAT)
    assert again.is_valid.tolist() == found.is_valid[order].tolist()


def test_more_prose_before_the_sids_of_one_row_is_no_broken_history() -> None:
    texts = ["历史：C1C5C10，请", "历史：（搜索：裙子）C1C5C10，请", "历史：，请", "历史：C1C5，请"]
    found = split_prompts(pa.array(texts), FORMAT)
    assert found.is_valid.tolist() == [True, True, True, False]
    assert found.before.to_pylist()[1] == "历史：（搜索：裙子）"
    assert found.history.row(1).tolist() == [1, 1, 1]
    assert join_prompts(found, FORMAT).to_pylist()[:3] == texts[:3]


@given(st.lists(st.text("ab;", max_size=9), max_size=8))
def test_lists_of_ids_come_back(texts: list[str]) -> None:
    found = split_ids(pa.array(texts, pa.string()), ";")
    assert join_ids(found, ";").to_pylist() == texts
    assert found.to_pylist() == [text.split(";") if text else [] for text in texts]


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_vectors_come_back_bit_for_bit(dim: int, rows: int, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**32, (rows, dim), dtype=np.uint32)
    texts = encode_vectors(bits.view(np.float32))
    found = decode_vectors(texts, dim)
    assert found.is_base64.all()
    assert found.vectors.view(np.uint32).tolist() == bits.tolist()


@given(st.text("AQgw+/=*", min_size=8, max_size=8))
def test_base64_is_taken_only_if_it_comes_back(text: str) -> None:
    found = decode_vectors(pa.array([text]), 1)
    if found.is_base64[0]:
        assert encode_vectors(found.vectors).to_pylist() == [text]


ROWS = st.tuples(TEXT, TEXT.map(lambda text: text + "x"))
KINDS = st.sampled_from(
    [
        ("sequences", ("user_history", "target_item")),
        ("gr", ("system", "user", "answer")),
        ("queries", ()),
    ]
)


@settings(max_examples=60)
@given(
    KINDS,
    st.lists(st.lists(TEXT, min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from([",", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_lines_that_are_kept_come_back_and_the_rest_is_listed(
    kind: tuple[str, tuple[str, ...]], rows: list[list[str]], delimiter: str, eol: str, quoted: bool
) -> None:
    name, columns = kind
    layout = Layout(
        kind=name, columns=columns, delimiter=delimiter if columns else "\x01", eol=eol,
        quoted=quoted and bool(columns),
    )  # fmt: skip
    fields = [pa.array(column) for column in zip(*(r[: len(columns)] for r in rows), strict=True)]
    lines = spell_lines(fields, layout) if columns else pa.array(["||$$||".join(r) for r in rows])
    raw = header_line(layout) + joined(lines, layout)
    batches = read_text(io.BytesIO(raw), layout, READING, name="f", block_bytes=1 << 20, part="p")
    (batch,) = batches
    fields = encode(batch.layout, batch.table, READING) if batch.table.num_rows else []
    kept = spell_lines(fields, layout).to_pylist() if fields else []
    gone = {row["row"]: row["text"] for row in batch.rejects.to_pylist()}
    rest = iter(kept)
    every = [gone[n] if n in gone else next(rest) for n in range(1, len(rows) + 1)]
    # A row without anything is a blank line, whatever its delimiters.
    is_bare = [not any(row[: len(columns)]) and bool(columns) for row in rows]
    expected = ["" if bare else line for bare, line in zip(is_bare, lines.to_pylist(), strict=True)]
    assert every == expected
    assert next(rest, None) is None


def read(
    raw: bytes, columns: tuple[str, ...], kind: str = "sequences", block: int = 1 << 20
) -> list[Batch]:
    layout = Layout(kind=kind, columns=columns, delimiter=",", eol="\n")
    return list(read_text(io.BytesIO(raw), layout, READING, name="f", block_bytes=block, part="p"))


COLUMNS = ("user_history", "target_item")


@pytest.mark.parametrize("block", [50, 1 << 20])
def test_bytes_that_are_no_text_are_left_out_in_lines_of_any_width(block: int) -> None:
    lines = [b"a;b,c", b"\xff\xfe,x,y", b"caf\xc3\xa9,d", b"\xe9,e", b"f", b"g,\xf0\x9f\x98\x80"]
    raw = b"\n".join([b",".join(one.encode() for one in COLUMNS), *lines, b""])
    batches = read(raw, COLUMNS, block=block)
    rejects = [one for batch in batches for one in batch.rejects.to_pylist()]
    assert [(one["row"], one["cause"], one["text"]) for one in rejects] == [
        (2, "wrong_columns", r"\xff\xfe,x,y"),
        (4, "not_utf8", r"\xe9,e"),
        (5, "wrong_columns", "f"),
    ]
    kept = [one for batch in batches for one in batch.table.to_pylist()]
    assert [(one["history"], one["targets"]) for one in kept] == [
        (["b", "a"], ["c"]),
        (["café"], ["d"]),
        (["g"], ["😀"]),
    ]


BLANKS = ("", "", "  ", "")
GOOD = {
    "sequences": ("user_history,target_item", "a;b,c"),
    "gr": ("system,user,answer", "s,u C0C4C9 v,C1C5C10"),
    "item_emb": ("item_id,feature", "a,AACAPwAAAEA="),
    "item_sid": ("item_id,lv1,lv2,lv3", "a,1,2,3"),
    "queries": (None, "1||$$||1.0||$$||a||$$||b"),
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("eol", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("delimiter", "quoted"), [(",", False), ("\t", False), (",", True), ("\t", True)]
)
@pytest.mark.parametrize("has_end", [True, False])
def test_blank_lines_are_left_out_as_such_and_decide_nothing(
    kind: str, eol: str, delimiter: str, quoted: bool, has_end: bool
) -> None:
    header, good = GOOD[kind]
    rows = [one.split(",") for one in (header, good) if one]
    mark = '"' if quoted and header else ""
    spelled = [delimiter.join(f"{mark}{one}{mark}" for one in row) for row in rows]
    if not header:
        spelled = [good]
    bare = delimiter * (len(rows[0]) - 1) if header else ""
    # More of them than of rows, before the first, between two and at the end of the file.
    lines = [*spelled[:-1], *BLANKS, bare, spelled[-1], "", spelled[-1], *BLANKS, bare, "  "]
    layout = Layout(
        kind=kind, columns=tuple(rows[0]) if header else (), eol=eol, quoted=bool(mark),
        delimiter=delimiter if header else "\x01",
    )  # fmt: skip
    raw = eol.join([*lines, *[""] * has_end]).encode()
    batches = list(
        read_text(io.BytesIO(raw), layout, READING, name="f", block_bytes=1 << 20, part="p")
    )
    body = lines[1:] if header else lines
    rejects = [one for batch in batches for one in batch.rejects.to_pylist()]
    assert [(one["file"], one["row"], one["cause"], one["text"]) for one in rejects] == [
        ("f", number, "blank_line", line if line.isspace() and line != bare else "")
        for number, line in enumerate(body, 1)
        if line != spelled[-1]
    ]
    assert sum(batch.table.num_rows for batch in batches) == 2
    assert batches[-1].layout.answers == ("sids" if kind == "gr" else "")
    assert batches[-1].layout.dim == (2 if kind == "item_emb" else 0)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_a_file_may_begin_with_batches_of_blank_lines(skip: int) -> None:
    raw = b"item_id,feature\n" + b"\n" * 100 + b"a,AACAPwAAAEA=\n" * 20 + b"\n\n"
    layout = Layout(kind="item_emb", columns=("item_id", "feature"))
    batches = list(
        read_text(io.BytesIO(raw), layout, READING, name="f", block_bytes=64, part="p", skip=skip)
    )
    causes = [one for batch in batches for one in batch.rejects["cause"].to_pylist()]
    assert batches[-1].layout.dim == 2
    if not skip:
        assert batches[0].layout.dim == 0
        assert causes == ["blank_line"] * 102
        assert sum(batch.table.num_rows for batch in batches) == 20


def test_fields_of_blanks_among_others_are_no_blank_line() -> None:
    batches = read(b"user_history,target_item\na,\n,b\n,\n a ,b\n", COLUMNS)
    (batch,) = batches
    assert [(one["row"], one["cause"]) for one in batch.rejects.to_pylist()] == [
        (1, "no_target"),
        (3, "blank_line"),
    ]


@pytest.mark.parametrize(
    "lines",
    [
        ["a,b", '"c,d', "e,f", "g,h"],
        ["a,b", '"c,d', "e,f", 'g",h,i', "j,k"],
        ["a,b", 'c,"', "e,f", '",h', "j,k"],
    ],
)
def test_a_quote_that_hides_rows_is_an_error_that_names_the_row(lines: list[str]) -> None:
    raw = "\n".join([",".join(COLUMNS), *lines, ""]).encode()
    with pytest.raises(DataError, match=r"f row 2: fields in quotes must end in their row"):
        read(raw, COLUMNS)


def test_lines_within_quotes_are_no_error_where_nothing_is_hidden() -> None:
    raw = b'system,user,answer\n"two\nlines",no codes\n"two\nlines",no codes,here\n'
    (batch,) = read(raw, ("system", "user", "answer"), "gr")
    assert [one["cause"] for one in batch.rejects.to_pylist()] == ["wrong_columns"]
    assert batch.table["system"].to_pylist() == ["two\nlines"]


def test_stride_spells_what_fixed_size_scorers_read() -> None:
    strided = replace(FORMAT, stride=8192)
    parsed = FORMAT.parse(pa.array(["C3C8C14"]))
    assert strided.spell(parsed.codes).to_pylist() == ["C3C8196C16389"]
