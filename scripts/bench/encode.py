"""Encoding beside bare faiss flat searches over the same codebooks.

The bare side does what encoding means and nothing else: per level one exact search over all rows
at once, and one subtraction. The two sides take turns; the best of the turns counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch

from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig

LEVELS, TURNS = 3, 5
SHAPES = ((64, 256, 400_000), (64, 2048, 100_000), (384, 256, 100_000), (512, 8192, 16_384))
"""Width, codes per level, rows: TIGER's and larger codebooks, MiniLM vectors, FORGE's size."""


def run(scale: float) -> dict[str, Any]:
    """Rows per second of both sides by shape, and the share of equal codes."""
    return {
        f"d{dim} {LEVELS}x{size}": compare(dim, size, max(size, int(rows * scale)))
        for dim, size, rows in SHAPES
    }


def compare(dim: int, size: int, rows: int) -> dict[str, Any]:
    """One shape."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((rows, dim), dtype=np.float32)
    quantizer = RqKmeansConfig(levels=LEVELS, codebook_size=size).build(dim, seed=0)
    books = [
        rng.standard_normal((size, dim), dtype=np.float32) * np.float32(0.8**level)
        for level in range(LEVELS)
    ]
    quantizer.codebooks = [torch.from_numpy(book) for book in books]
    sides = (lambda: quantizer.encode(vectors), lambda: bare(vectors, books))
    ours, theirs = best_turns(sides)
    return {
        "rows": rows,
        "rows_per_second": round(rows / ours),
        "bare_rows_per_second": round(rows / theirs),
        "ratio": round(theirs / ours, 2),
        "equal_codes": float((sides[0]() == sides[1]()).mean()),
    }


def bare(vectors: np.ndarray, books: list[np.ndarray]) -> np.ndarray:
    """Codes by faiss alone."""
    residual = vectors.copy()
    codes = np.empty((len(vectors), len(books)), dtype=np.int64)
    for level, book in enumerate(books):
        index = faiss.IndexFlatL2(book.shape[1])
        index.add(book)
        codes[:, level] = index.search(residual, 1)[1][:, 0]
        residual -= book[codes[:, level]]
    return codes


def best_turns(sides: tuple[Callable[[], Any], Callable[[], Any]]) -> list[float]:
    """Fewest seconds of each side over alternating turns, after one to warm up."""
    seconds: list[list[float]] = [[], []]
    for _ in range(TURNS + 1):
        for side, work in enumerate(sides):
            start = time.perf_counter()
            work()
            seconds[side].append(time.perf_counter() - start)
    return [min(one[1:]) for one in seconds]
