"""Embedding hitrate: is the target a near neighbour of the history, judged by some item vectors?

FORGE's proxy for what a SID preserves: the vectors are what the SID can be decoded to, and the raw
item vectors give the ceiling. Pure NumPy, SciPy and faiss; knows nothing about datasets or files.

Source: FORGE (arXiv 2509.20904), the procedure of its former public script: union of the k nearest
items of every history item. Where we differ: rows whose target is outside the gallery are dropped
in the exact search too; ties are broken by the expected value instead of by index order; the
trigger is removed by its id instead of by its rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from forge_ray.data.ragged import Ragged

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_PAIR_BLOCK = 1 << 17
"""(history item, target) pairs compared with their neighbour lists at a time: bounds memory."""


@dataclass(frozen=True)
class HitrateReport:
    """Result of `embedding_hitrate`."""

    hitrate: float
    """Expected share of rows whose target is found, 0..1; NaN when no row qualifies."""
    standard_error: float
    """Of `hitrate`, over rows."""
    num_rows: int
    """Rows with the target and at least one history item in the gallery."""
    gallery_size: int
    """Items searched."""
    method: Literal["exact", "hnsw"]
    """How the neighbours were found."""


@dataclass(frozen=True)
class Gallery:
    """Unit vectors of the searched items, identical ones stored once."""

    vectors: Floats
    """[G, D] distinct unit vectors."""
    group: Integers
    """[n] which distinct vector each gallery item has."""
    sizes: Integers
    """[G] items on each distinct vector."""


def build_gallery(vectors: npt.NDArray[np.floating[Any]]) -> Gallery:
    """Scale vectors to unit length and merge identical ones, which are ties by construction.

    Args:
        vectors: [n, D]; items that share a SID have identical decoded vectors.
    """
    packed = np.ascontiguousarray(vectors, dtype=np.float32) + np.float32(0)  # −0.0 → 0.0
    rows = packed.view(np.dtype((np.void, packed.dtype.itemsize * packed.shape[1]))).ravel()
    _, first, group = np.unique(rows, return_index=True, return_inverse=True)
    distinct = packed[first]
    norms = np.linalg.norm(distinct, axis=1, keepdims=True)
    unit = distinct / np.maximum(norms, np.finfo(np.float32).tiny)
    group = group.astype(np.int64)
    return Gallery(unit, group, np.bincount(group, minlength=len(unit)))


def embedding_hitrate(
    vectors: npt.NDArray[np.floating[Any]],
    histories: Ragged,
    targets: npt.NDArray[np.integer[Any]],
    *,
    items: npt.NDArray[np.integer[Any]] | None = None,
    k: int = 30,
    exact_limit: int = 200_000,
    row_weight: npt.NDArray[np.float64] | None = None,
) -> HitrateReport:
    """Expected share of rows whose target is among the k nearest items of some history item.

    Inside a tie (identical vectors) the order is taken as random and independent for each history
    item, and the expectation is computed exactly: `1 − Π_t (1 − P(target in top k of t))`.

    Memory: the distinct vectors, k + 1 neighbours for each distinct history item, and a fixed
    block of pairs.

    Args:
        vectors: [n, D] of the gallery items, any scale.
        histories: item indices before the target, R rows.
        targets: item index of each row's target [R].
        items: item index of each gallery row [n]; by default row i is item i.
        k: neighbours of each history item.
        exact_limit: distinct vectors up to which the search is exact; HNSW (inner product, M 16,
            construction depth 256) beyond.
        row_weight: weight of each row [R], default 1.
    """
    gallery = build_gallery(vectors)
    place = _places(items, len(vectors), histories, targets)
    pairs = _pairs(histories, targets, place)
    weight = np.ones(len(targets)) if row_weight is None else row_weight
    method: Literal["exact", "hnsw"] = "exact" if len(gallery.vectors) <= exact_limit else "hnsw"
    rows = np.unique(pairs.row)
    if len(rows) == 0:
        return HitrateReport(float("nan"), float("nan"), 0, len(vectors), method)
    probability = _pair_probability(gallery, pairs, k=k, method=method)
    # log(1 − 1) = −inf is meant: one certain trigger makes the row certain.
    with np.errstate(divide="ignore"):
        missed = np.log1p(-probability)
    hit = 1.0 - np.exp(np.bincount(pairs.row, weights=missed, minlength=len(targets))[rows])
    weight = weight[rows]
    mean = float((hit * weight).sum() / weight.sum())
    error = float(np.sqrt((weight**2 * (hit - mean) ** 2).sum()) / weight.sum())
    return HitrateReport(mean, error, len(rows), len(vectors), method)


@dataclass(frozen=True)
class _Pairs:
    row: Integers
    trigger: Integers
    """Gallery row of a distinct history item."""
    target: Integers
    """Gallery row of the target."""

    def part(self, block: slice) -> _Pairs:
        return _Pairs(self.row[block], self.trigger[block], self.target[block])


def _places(
    items: npt.NDArray[np.integer[Any]] | None,
    size: int,
    histories: Ragged,
    targets: npt.NDArray[np.integer[Any]],
) -> Integers:
    """Gallery row of every item index, −1 for items outside the gallery."""
    own = np.arange(size) if items is None else items
    top = max(own.max(initial=-1), histories.values.max(initial=-1), targets.max(initial=-1))
    place = np.full(int(top) + 1, -1, dtype=np.int64)
    place[own] = np.arange(size)
    return place


def _pairs(histories: Ragged, targets: npt.NDArray[np.integer[Any]], place: Integers) -> _Pairs:
    """Distinct (row, history item) with the target, both inside the gallery."""
    row, trigger = histories.row_ids, place[histories.values]
    kept = (trigger >= 0) & (place[targets][row] >= 0)
    width = np.int64(len(place))
    keys = np.unique(row[kept] * width + trigger[kept])
    row = keys // width
    return _Pairs(row, keys % width, place[targets][row])


def _pair_probability(
    gallery: Gallery, pairs: _Pairs, *, k: int, method: Literal["exact", "hnsw"]
) -> npt.NDArray[np.float64]:
    """P(target among the k nearest items of the trigger), for each pair."""
    queries, query_of = np.unique(gallery.group[pairs.trigger], return_inverse=True)
    # k + 1 distinct vectors hold at least k items besides the trigger.
    near = _neighbours(gallery.vectors, queries, k=min(k + 1, len(gallery.vectors)), method=method)
    sizes = np.where(near >= 0, gallery.sizes[near], 0)
    before = np.cumsum(sizes, axis=1) - sizes
    found = np.zeros(len(pairs.row))
    for start in range(0, len(pairs.row), _PAIR_BLOCK):
        block = slice(start, start + _PAIR_BLOCK)
        query = query_of[block]
        found[block] = _block_probability(
            gallery, pairs.part(block), near[query], before[query], k=k
        )
    return found


def _block_probability(
    gallery: Gallery, pairs: _Pairs, near: Integers, before: Integers, *, k: int
) -> npt.NDArray[np.float64]:
    own, wanted = gallery.group[pairs.trigger], gallery.group[pairs.target]
    at = near == wanted[:, None]
    column = at.argmax(axis=1)
    rows = np.arange(len(near))
    is_found = at[rows, column] & (pairs.trigger != pairs.target)
    # The trigger itself leaves the list: one item less ahead of, or inside, the target's tie.
    own_at = near == own[:, None]
    is_own_ahead = own_at.any(axis=1) & (own_at.argmax(axis=1) < column)
    ahead = before[rows, column] - is_own_ahead
    tied = gallery.sizes[wanted] - (own == wanted)
    share = np.clip((k - ahead) / np.maximum(tied, 1), 0.0, 1.0)
    return np.where(is_found, share, 0.0)


def _neighbours(
    vectors: Floats, queries: Integers, *, k: int, method: Literal["exact", "hnsw"]
) -> Integers:
    """Rows of the k nearest vectors by inner product, best first; −1 where HNSW found fewer."""
    dim = vectors.shape[1]
    index = faiss.IndexFlatIP(dim) if method == "exact" else _hnsw(dim, k)
    index.add(vectors)
    _, near = index.search(vectors[queries], k)
    return np.asarray(near, dtype=np.int64)


def _hnsw(dim: int, k: int) -> Any:
    index = faiss.IndexHNSWFlat(dim, 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 256
    index.hnsw.efSearch = max(50, 2 * k)
    return index


def refit_vectors(
    codes: npt.NDArray[np.integer[Any]],
    codebook_sizes: Sequence[int],
    vectors: npt.NDArray[np.floating[Any]],
    *,
    sweeps: int = 4,
) -> Floats:
    """Reconstruct item vectors from codes whose codebooks were not published.

    Finds one codeword for each code so that the sum over levels is closest to the item vectors
    (least squares, block-wise: each sweep sets every level's codewords to the mean residual of
    their items). The first sweep is exactly residual k-means' own update, so the codewords of an
    RQ-k-means table of these vectors are recovered. It is a stand-in for the decoder: with more
    codewords than items it can memorise, so compare tables of equal size.

    Args:
        codes: integer codes [n, L].
        codebook_sizes: codes per level, length L.
        vectors: item vectors [n, D].
        sweeps: passes over the levels, >= 1.

    Returns:
        float32 [n, D]: sums of the refitted codewords; equal for items that share a SID.
    """
    residual = np.array(vectors, dtype=np.float32)
    onehots = [_onehot(codes[:, level], size) for level, size in enumerate(codebook_sizes)]
    counts = [np.maximum(np.asarray(one.sum(axis=0)).ravel(), 1.0) for one in onehots]
    width = residual.shape[1]
    words = [np.zeros((int(size), width), dtype=np.float32) for size in codebook_sizes]
    for _ in range(sweeps):
        for level, onehot in enumerate(onehots):
            step = ((onehot.T @ residual) / counts[level][:, None]).astype(np.float32)
            words[level] += step
            residual -= step[codes[:, level]]
    total = np.zeros_like(residual)
    for level in range(len(onehots)):
        total += words[level][codes[:, level]]
    return total


def _onehot(column: npt.NDArray[np.integer[Any]], size: int) -> Any:
    rows = np.arange(len(column) + 1)
    ones = np.ones(len(column), dtype=np.float32)
    return sp.csr_array((ones, column.astype(np.int64), rows), shape=(len(column), int(size)))
