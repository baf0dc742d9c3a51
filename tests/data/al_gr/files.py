"""AL-GR files in exactly the published layouts, with the known defects planted on request."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SYSTEM = "你是一个推荐系统，每个行为用三个词表示。"
BEFORE, AFTER = "当前用户的历史行为如下：", "，请预测用户后续行为的语义编码"
DIM = 512


def sid(rng: np.random.Generator) -> str:
    return "".join(f"C{code + level * 8192}" for level, code in enumerate(rng.integers(0, 8192, 3)))


def item(rng: np.random.Generator) -> str:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return "".join(rng.choice(list(letters), 5))


def write_rows(
    path: Path,
    rows: Sequence[Sequence[str]],
    *,
    delimiter: str = ",",
    eol: str = "\n",
    quoted: bool = False,
    final_eol: bool = True,
) -> Path:
    buffer = io.StringIO()
    style = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    csv.writer(buffer, delimiter=delimiter, lineterminator=eol, quoting=style).writerows(rows)
    text = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((text if final_eol else text.removesuffix(eol)).encode())
    return path


def gr_rows(rng: np.random.Generator, rows: int, *, answers: str = "sids") -> list[list[str]]:
    found = []
    for _ in range(rows):
        history = "".join(sid(rng) for _ in range(rng.integers(1, 6)))
        items = ";".join(item(rng) for _ in range(rng.integers(1, 4)))
        answer = sid(rng) if answers == "sids" else items
        found.append([SYSTEM, f"{BEFORE}{history}{AFTER}", answer])
    return found


def feature(vector: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def embedding_rows(rng: np.random.Generator, rows: int, dim: int = DIM) -> list[list[str]]:
    return [[item(rng), feature(rng.standard_normal(dim))] for _ in range(rows)]


def sequence_rows(rng: np.random.Generator, rows: int) -> list[list[str]]:
    return [
        [
            ";".join(item(rng) for _ in range(rng.integers(0, 6))),
            ";".join(item(rng) for _ in range(rng.integers(1, 3))),
        ]
        for _ in range(rows)
    ]


def item_sid_rows(rng: np.random.Generator, rows: int) -> list[list[str]]:
    return [[item(rng), *(str(code) for code in rng.integers(0, 8192, 3))] for _ in range(rows)]


def query_line(rng: np.random.Generator, number: int) -> str:
    clicked = ",".join(item(rng) for _ in range(rng.integers(0, 5)))
    fields = [f"list{number}", str(float(rng.integers(0, 2))), item(rng), clicked]
    return "||$$||".join(fields)


def write_pairs_npz(path: Path, rng: np.random.Generator, *, items: int, name: str) -> Path:
    mapping = {int(one) * 7: row for row, one in enumerate(rng.permutation(items))}
    np.savez(
        path,
        **{
            name: np.array(mapping, dtype=object),
            "pairs": rng.integers(0, items, (items * 2, 2)),
            "embeds": rng.standard_normal((items, 16)).astype(np.float16),
        },
    )
    return path
