"""A tiny raw data set on disk that tests break in one place at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

EVENTS = [
    ("ann", "a", 10),
    ("ann", "b", 20),
    ("ann", "c", 20),
    ("ann", "d", 40),
    ("bob", "b", 5),
    ("bob", "c", 6),
    ("bob", "a", 7),
    ("cid", "d", 1),
]
ITEMS = [{"item_id": name, "title": f"title {name}"} for name in "dcba"]


def write_events(folder: Path, rows: list[tuple[Any, ...]], header: str | None = None) -> Path:
    path = folder / "interactions.csv"
    lines = [header or "user_id,item_id,timestamp", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_items(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_vectors(folder: Path, ids: list[str], vectors: Any) -> Path:
    path = folder / "vectors.npz"
    np.savez(path, item_id=np.array(ids), embedding=np.asarray(vectors, dtype=np.float32))
    return path


def write_raw(folder: Path) -> Path:
    """A valid data set: 4 items, 3 users, 8 interactions, vectors [4, 3]."""
    folder.mkdir(parents=True, exist_ok=True)
    write_events(folder, EVENTS)
    write_items(folder, ITEMS)
    write_vectors(folder, list("abcd"), np.arange(12).reshape(4, 3))
    return folder
