"""Embedding hitrate: is the target a near neighbour of the history, judged by some item vectors?

FORGE's proxy for what a SID preserves: the vectors are what the SID can be decoded to, and the raw
item vectors give the ceiling. Pure NumPy, SciPy and faiss; knows nothing about datasets or files.
A gallery larger than memory comes in shards; `sharded` spreads them over a cluster.

Source: FORGE (arXiv 2509.20904), the procedure of its former public script: union of the k nearest
items of every history item. Where we differ: rows whose target is outside the gallery are dropped
in the exact search too; ties are broken by the expected value instead of by index order; the
trigger is removed by its id instead of by its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from forge_ray.data.ragged import Ragged
from forge_ray.sid.metrics.neighbours import (
    ArrayGallery,
    Entries,
    Floats,
    GallerySource,
    Integers,
    Method,
    Neighbours,
    merge_identical,
    merge_neighbours,
    search,
)

Tasks: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Runs a function on many arguments and yields the results in any order: `map`, or a cluster's."""

_PAIR_BLOCK = 1 << 17
"""(history item, target) pairs compared with their neighbour lists at a time: bounds memory."""
_QUERY_BLOCK = 1 << 16
"""Queries of one task: its result takes 20 bytes for each of their neighbours."""


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
    method: Method
    """How the neighbours were found."""


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
    """Measure embedding hitrate with vectors in memory; see `hitrate_of`.

    Args:
        vectors: [n, D] of the gallery items, any scale.
        histories: item indices before the target, R rows.
        targets: item index of each row's target [R].
        items: item index of each gallery row [n]; by default row i is item i.
        k: neighbours of each history item.
        exact_limit: distinct vectors up to which the search is exact.
        row_weight: weight of each row [R], default 1.
    """
    own = np.arange(len(vectors)) if items is None else items
    return hitrate_of(
        ArrayGallery(own, vectors),
        histories,
        targets,
        k=k,
        exact_limit=exact_limit,
        row_weight=row_weight,
    )


def hitrate_of(
    source: GallerySource,
    histories: Ragged,
    targets: npt.NDArray[np.integer[Any]],
    *,
    k: int = 30,
    exact_limit: int = 200_000,
    row_weight: npt.NDArray[np.float64] | None = None,
    tasks: Tasks = map,
) -> HitrateReport:
    """Expected share of rows whose target is among the k nearest items of some history item.

    Inside a tie (identical vectors) the order is taken as random and independent for each history
    item, and the expectation is computed exactly: `1 − Π_t (1 − P(target in top k of t))`.

    Memory: here the vectors of the distinct history items and 20 bytes for each of their k + 1
    neighbours; in each task one shard. Shards do not change the value.

    Args:
        source: the searched items.
        histories: item indices before the target, R rows.
        targets: item index of each row's target [R].
        k: neighbours of each history item.
        exact_limit: distinct vectors (counted shard by shard) up to which the search is exact; HNSW
            (inner product, M 16, construction depth 256) beyond.
        row_weight: weight of each row [R], default 1.
        tasks: runs the work on shards.
    """
    listed = np.union1d(histories.values, targets).astype(np.int64)
    shards = _prepared(source)
    scan = _Scan(shards, listed, np.unique(histories.values).astype(np.int64))
    found = _Listed.join(tasks(scan, range(source.num_shards)))
    pairs = _pairs(histories, targets, found)
    method: Method = "exact" if found.num_entries <= exact_limit else "hnsw"
    if len(pairs.row) == 0:
        return HitrateReport(float("nan"), float("nan"), 0, source.num_items, method)
    # k + 1 distinct vectors hold at least k items besides the trigger.
    near = _search_all(shards, source.num_shards, found.queries, k + 1, method, tasks)
    probability = _pair_probability(near, found, pairs, k=k)
    return _report(probability, pairs, row_weight, len(targets), source.num_items, method)


def _report(
    probability: npt.NDArray[np.float64],
    pairs: _Pairs,
    row_weight: npt.NDArray[np.float64] | None,
    num_rows: int,
    num_items: int,
    method: Method,
) -> HitrateReport:
    rows = np.unique(pairs.row)
    # log(1 − 1) = −inf is meant: one certain trigger makes the row certain.
    with np.errstate(divide="ignore"):
        missed = np.log1p(-probability)
    hit = 1.0 - np.exp(np.bincount(pairs.row, weights=missed, minlength=num_rows)[rows])
    weight = np.ones(len(rows)) if row_weight is None else row_weight[rows]
    mean = float((hit * weight).sum() / weight.sum())
    error = float(np.sqrt((weight**2 * (hit - mean) ** 2).sum()) / weight.sum())
    return HitrateReport(mean, error, len(rows), num_items, method)


@dataclass(frozen=True, eq=False)
class _Shard:
    items: Integers
    entries: Entries


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A gallery of one shard, prepared once for both passes."""

    shard: _Shard

    def __call__(self, _: int) -> _Shard:
        return self.shard


@dataclass(frozen=True, eq=False)
class _Loader:
    source: GallerySource

    def __call__(self, number: int) -> _Shard:
        items, vectors = self.source.load(number)
        return _Shard(items, merge_identical(vectors))


def _prepared(source: GallerySource) -> Callable[[int], _Shard]:
    loader = _Loader(source)
    return _Loaded(loader(0)) if source.num_shards == 1 else loader


@dataclass(frozen=True, eq=False)
class _Listed:
    """What one shard, or all, know about the listed items."""

    items: Integers
    """Listed items inside the gallery [m]."""
    names: Integers
    """Hash of each one's vector [m]."""
    query_names: Integers
    """Distinct vectors of history items [Q]."""
    queries: Floats
    """Those vectors [Q, D], unit length."""
    num_entries: int
    """Distinct vectors."""

    @classmethod
    def join(cls, parts: Iterable[_Listed]) -> _Listed:
        """Put the shards' findings together, in an order that does not depend on theirs."""
        known = list(parts)
        items = np.concatenate([part.items for part in known])
        names = np.concatenate([part.names for part in known])
        order = np.argsort(items)
        query_names, first = np.unique(
            np.concatenate([part.query_names for part in known]), return_index=True
        )
        queries = np.concatenate([part.queries for part in known])[first]
        total = sum(part.num_entries for part in known)
        return cls(items[order], names[order], query_names, queries, total)


@dataclass(frozen=True, eq=False)
class _Scan:
    """First pass over a shard: where the listed items are, and the vectors that will search."""

    shards: Callable[[int], _Shard]
    listed: Integers
    triggers: Integers

    def __call__(self, number: int) -> _Listed:
        shard = self.shards(number)
        names = shard.entries.item_names
        is_listed = np.isin(shard.items, self.listed)
        asked = np.unique(names[np.isin(shard.items, self.triggers)])
        order = np.argsort(shard.entries.names)
        rows = order[np.searchsorted(shard.entries.names, asked, sorter=order)]
        return _Listed(
            items=shard.items[is_listed],
            names=names[is_listed],
            query_names=asked,
            queries=shard.entries.vectors[rows],
            num_entries=len(shard.entries.names),
        )


@dataclass(frozen=True, eq=False)
class _Search:
    """Second pass: some queries against one shard."""

    shards: Callable[[int], _Shard]
    queries: Floats
    k: int
    method: Method

    def __call__(self, task: tuple[int, int]) -> tuple[int, Neighbours]:
        number, start = task
        queries = self.queries[start : start + _QUERY_BLOCK]
        entries = self.shards(number).entries
        return start, search(entries, queries, self.k, method=self.method)


def _search_all(
    shards: Callable[[int], _Shard],
    num_shards: int,
    queries: Floats,
    k: int,
    method: Method,
    tasks: Tasks,
) -> Neighbours:
    run = _Search(shards, queries, k, method)
    starts = range(0, len(queries), _QUERY_BLOCK)
    merged: dict[int, Neighbours] = {}
    for start, part in tasks(run, [(shard, at) for shard in range(num_shards) for at in starts]):
        before = merged.get(start)
        merged[start] = part if before is None else merge_neighbours(before, part, k)
    blocks = [merged[start] for start in starts]
    width = max(block.names.shape[1] for block in blocks)
    assert all(block.names.shape[1] == width for block in blocks)
    return Neighbours(
        np.concatenate([block.scores for block in blocks]),
        np.concatenate([block.names for block in blocks]),
        np.concatenate([block.sizes for block in blocks]),
    )


@dataclass(frozen=True, eq=False)
class _Pairs:
    row: Integers
    trigger: Integers
    """Place of a distinct history item among the listed ones."""
    target: Integers
    """Place of the target among the listed ones."""

    def part(self, block: slice) -> _Pairs:
        return _Pairs(self.row[block], self.trigger[block], self.target[block])


def _pairs(histories: Ragged, targets: npt.NDArray[np.integer[Any]], found: _Listed) -> _Pairs:
    """Distinct (row, history item) with the target, both inside the gallery."""
    row = histories.row_ids
    trigger, target = _places(found.items, histories.values), _places(found.items, targets)
    kept = (trigger >= 0) & (target[row] >= 0)
    width = np.int64(max(1, len(found.items)))
    keys = np.unique(row[kept] * width + trigger[kept])
    row = keys // width
    return _Pairs(row, keys % width, target[row])


def _places(known: Integers, items: npt.NDArray[np.integer[Any]]) -> Integers:
    """Place of each item among the sorted known ones, −1 where absent."""
    if len(known) == 0:
        return np.full(len(items), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(known, items), len(known) - 1)
    return np.where(known[at] == items, at, -1)


def _pair_probability(
    near: Neighbours, found: _Listed, pairs: _Pairs, *, k: int
) -> npt.NDArray[np.float64]:
    """P(target among the k nearest items of the trigger), for each pair."""
    before = np.cumsum(near.sizes, axis=1) - near.sizes
    query_of = np.searchsorted(found.query_names, found.names)
    out = np.empty(len(pairs.row))
    for start in range(0, len(pairs.row), _PAIR_BLOCK):
        block = slice(start, start + _PAIR_BLOCK)
        part = pairs.part(block)
        query = query_of[part.trigger]
        here = Neighbours(near.scores[query], near.names[query], near.sizes[query])
        out[block] = _block_probability(here, before[query], found.names, part, k=k)
    return out


def _block_probability(
    near: Neighbours, before: Integers, names: Integers, pairs: _Pairs, *, k: int
) -> npt.NDArray[np.float64]:
    own, wanted = names[pairs.trigger], names[pairs.target]
    is_full = near.sizes > 0
    at = (near.names == wanted[:, None]) & is_full
    column = at.argmax(axis=1)
    rows = np.arange(len(near.names))
    is_found = at[rows, column] & (pairs.trigger != pairs.target)
    # The trigger itself leaves the list: one item less ahead of, or inside, the target's tie.
    own_at = (near.names == own[:, None]) & is_full
    is_own_ahead = own_at.any(axis=1) & (own_at.argmax(axis=1) < column)
    ahead = before[rows, column] - is_own_ahead
    tied = near.sizes[rows, column] - (own == wanted)
    share = np.clip((k - ahead) / np.maximum(tied, 1), 0.0, 1.0)
    return np.where(is_found, share, 0.0)


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


def refit_depths(
    codes: npt.NDArray[np.integer[Any]],
    codebook_sizes: Sequence[int],
    vectors: npt.NDArray[np.floating[Any]],
) -> Iterator[Floats]:
    """Refit each depth 1..L on its own; see `refit_vectors`.

    Args:
        codes: integer codes [n, L].
        codebook_sizes: codes per level, length L.
        vectors: item vectors [n, D].

    Yields:
        float32 [n, D] for each depth.
    """
    for depth in range(1, codes.shape[1] + 1):
        yield refit_vectors(codes[:, :depth], codebook_sizes[:depth], vectors)


def _onehot(column: npt.NDArray[np.integer[Any]], size: int) -> Any:
    rows = np.arange(len(column) + 1)
    ones = np.ones(len(column), dtype=np.float32)
    return sp.csr_array((ones, column.astype(np.int64), rows), shape=(len(column), int(size)))
