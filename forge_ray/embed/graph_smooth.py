"""Smoothing item vectors over a frozen item graph: x + γ·S x.

Pure numerics. The graph is either train co-occurrence or the nearest neighbours of the vectors
themselves; both keep a few neighbours an item, so nothing grows with N².

Source: FREEDOM (arXiv 2211.06924) for the frozen kNN graph (k = 10, cosine, self removed). Where
we differ: each row is normalised by its own sum, which for a graph of exactly k neighbours an item
equals the source's symmetric normalisation by out-degrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from forge_ray.embed.behaviour import FloatArray
from forge_ray.errors import ConfigError

EXACT_ITEMS = 50_000
"""Catalogue size up to which neighbours are searched exactly; an inverted file beyond."""
BLOCK_ENTRIES = 4_000_000
"""Graph entries or vector components handled at a time."""
_PROBES = 16
_FIT_ITEMS = 262_144


@dataclass(kw_only=True)
class GraphSmoothConfig:
    """Pulling items towards their neighbours in a graph."""

    gamma: float = 0.0
    """Weight of the neighbours' mean, γ; 0 for none. On Amazon Beauty 1 to 4 serves co-occurrence
    best; with kNN uniqueness falls as γ grows."""
    graph: Literal["co_occurrence", "knn"] = "co_occurrence"
    """Train co-occurrence, or the nearest vectors by cosine, which needs no behaviour."""
    neighbours: int = 10
    """Strongest neighbours kept for each item; 10 in FREEDOM."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.gamma < 0:
            raise ConfigError(
                f"vectors.smooth.gamma must be >= 0, got {self.gamma}. Use 0 for none."
            )
        if self.neighbours < 1:
            raise ConfigError(
                f"vectors.smooth.neighbours must be >= 1, got {self.neighbours}. Raise it."
            )


def smooth(vectors: FloatArray, graph: sp.csr_array, *, gamma: float) -> FloatArray:
    """Add the weighted mean of its neighbours to every vector.

    Args:
        vectors: float32 [N, D].
        graph: non-negative weights [N, N]; items without neighbours stay as they are.
        gamma: weight of the mean; 0 returns `vectors` themselves.

    Returns:
        float32 [N, D]; takes the output and blocks of `BLOCK_ENTRIES` beside the inputs.
    """
    if gamma == 0:
        return vectors
    out = np.empty_like(vectors)
    for rows in _row_blocks(np.full(len(vectors), vectors.shape[1])):
        part = graph[rows]
        total = np.asarray(part.sum(axis=1)).ravel()
        mean = (part @ vectors) / np.where(total > 0, total, 1)[:, None]
        out[rows] = vectors[rows] + gamma * mean
    return out


def strongest(counts: sp.csr_array, limit: int) -> sp.csr_array:
    """Keep the `limit` largest entries of every row, ties by smaller column.

    Args:
        counts: canonical [N, N].
        limit: entries to keep in a row.

    Returns:
        float32 [N, N], at most N·limit entries; sorts `BLOCK_ENTRIES` at a time.
    """
    degree = np.diff(counts.indptr)
    kept = [_strongest_of(counts, rows, limit) for rows in _row_blocks(degree)]
    columns = np.concatenate([np.empty(0, np.int32), *(one.indices for one in kept)])
    weights = np.concatenate([np.empty(0, np.float32), *(one.data for one in kept)])
    starts = np.concatenate(([0], np.cumsum(np.minimum(degree, limit))))
    return sp.csr_array((weights, columns, starts), shape=counts.shape)


def nearest(vectors: FloatArray, limit: int) -> sp.csr_array:
    """Find the most similar other items of every item by cosine.

    Args:
        vectors: float32 [N, D].
        limit: neighbours per item.

    Returns:
        float32 [N, N] cosines, min(limit, N − 1) entries a row, negative ones included; fewer
        where the inverted file (beyond `EXACT_ITEMS`, `_PROBES` lists searched) finds fewer.
        Takes one copy of the vectors and 12 bytes per entry.
    """
    num_items = len(vectors)
    width = min(limit, num_items - 1)
    index = _filled_index(vectors)
    kept: list[npt.NDArray[Any]] = []
    similar: list[FloatArray] = []
    for rows in _row_blocks(np.full(num_items, vectors.shape[1])):
        score, item = index.search(_unit(vectors[rows]), width + 1)
        usable = (item >= 0) & (item != np.arange(num_items)[rows, None])
        # Among identical vectors an item may be missing from its own list.
        usable &= np.cumsum(usable, axis=1) <= width
        kept.append(np.where(usable, item, -1).astype(np.int32))
        similar.append(score)
    columns, weights = np.concatenate(kept), np.concatenate(similar)
    starts = np.concatenate(([0], np.cumsum((columns >= 0).sum(axis=1))))
    entries = (weights[columns >= 0], columns[columns >= 0], starts)
    return sp.csr_array(entries, shape=(num_items, num_items))


def unweighted(graph: sp.csr_array) -> sp.csr_array:
    """The same edges, each of weight 1, as in the kNN graph of the source."""
    ones = np.ones(graph.nnz, dtype=np.float32)
    return sp.csr_array((ones, graph.indices, graph.indptr), shape=graph.shape)


def _strongest_of(counts: sp.csr_array, rows: slice, limit: int) -> sp.csr_array:
    part = sp.csr_array(counts[rows])
    row = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
    order = np.lexsort((part.indices, -part.data, row))
    rank = np.arange(part.nnz) - part.indptr[row]
    kept = order[rank < limit]
    starts = np.concatenate(([0], np.cumsum(np.minimum(np.diff(part.indptr), limit))))
    entries = (part.data[kept].astype(np.float32), part.indices[kept], starts)
    return sp.csr_array(entries, shape=part.shape)


def _filled_index(vectors: FloatArray) -> Any:
    num_items, dim = vectors.shape
    index: Any = faiss.IndexFlatIP(dim)
    if num_items > EXACT_ITEMS:
        lists = int(4 * np.sqrt(num_items))
        index = faiss.IndexIVFFlat(index, dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = _PROBES
        stride = -(-num_items // min(num_items, _FIT_ITEMS))
        index.train(_unit(vectors[::stride]))
    for rows in _row_blocks(np.full(num_items, dim)):
        index.add(_unit(vectors[rows]))
    return index


def _unit(vectors: FloatArray) -> FloatArray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(norms, np.float32(1e-12)))


def _row_blocks(entries: npt.NDArray[np.integer[Any]]) -> Iterator[slice]:
    """Ranges of rows with at most `BLOCK_ENTRIES` entries each, one row at least."""
    total = np.cumsum(entries, dtype=np.int64)
    start = 0
    while start < len(total):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + BLOCK_ENTRIES, side="right")))
        yield slice(start, stop)
        start = stop
