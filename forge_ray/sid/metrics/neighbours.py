"""Nearest neighbours in a gallery that may be cut into shards, with identical vectors as ties.

Items that share a SID decode to one vector, so ties are the rule: identical vectors are merged into
one entry that knows how many items it stands for. An entry's name is a hash of its numbers, the
same in every shard, which is what lets the results of shards be merged.

Pure NumPy and faiss; knows nothing about datasets, histories or clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import faiss
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Method = Literal["exact", "hnsw"]

_HASH_ROWS = 8192
"""Rows hashed at a time: bounds the widened copy."""


class GallerySource(Protocol):
    """Vectors of the searched items, cut into shards of which one is held at a time; picklable."""

    @property
    def num_shards(self) -> int:
        """How many shards there are, >= 1."""

    @property
    def num_items(self) -> int:
        """Items in all shards."""

    def load(self, shard: int) -> tuple[Integers, Floats]:
        """Item indices [n] and their vectors [n, D], any scale, of one shard."""


@dataclass(frozen=True, eq=False)
class ArrayGallery:
    """A gallery in memory."""

    items: npt.NDArray[np.integer[Any]]
    """Item index of each row [n]."""
    vectors: npt.NDArray[np.floating[Any]]
    """[n, D], any scale."""
    shard_items: int | None = None
    """Rows of one shard; None for a single one."""

    @property
    def num_items(self) -> int:
        """Rows n."""
        return len(self.items)

    @property
    def num_shards(self) -> int:
        """Pieces of at most `shard_items` rows."""
        return max(1, -(-len(self.items) // (self.shard_items or max(1, len(self.items)))))

    def load(self, shard: int) -> tuple[Integers, Floats]:
        """See `GallerySource`."""
        width = self.shard_items or len(self.items)
        rows = slice(shard * width, (shard + 1) * width)
        return self.items[rows].astype(np.int64), np.asarray(self.vectors[rows], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Entries:
    """Distinct unit vectors of some items."""

    vectors: Floats
    """[G, D] unit vectors."""
    names: Integers
    """[G] hash of each."""
    sizes: Integers
    """[G] items on each."""
    item_names: Integers
    """[n] hash of each item's vector, in the order of the items."""


def merge_identical(vectors: npt.NDArray[np.floating[Any]]) -> Entries:
    """Scale vectors to unit length and merge identical ones.

    Args:
        vectors: [n, D]; rows of zeros stay zero.
    """
    packed = np.ascontiguousarray(vectors, dtype=np.float32) + np.float32(0)  # −0.0 → 0.0
    item_names = row_hashes(packed)
    names, first, sizes = np.unique(item_names, return_index=True, return_counts=True)
    if len(names) < len(packed):
        order = np.argsort(first)  # the gallery's own order: rows are copied in one sweep
        packed, names, sizes = packed[first[order]], names[order], sizes[order]
    else:
        names, sizes = item_names, np.ones(len(packed), dtype=np.int64)
    norms = np.sqrt(np.einsum("ij,ij->i", packed, packed))[:, None]
    packed /= np.maximum(norms, np.finfo(np.float32).tiny)
    return Entries(packed, names, sizes.astype(np.int64), item_names)


def row_hashes(vectors: Floats) -> Integers:
    """Hash each row's bytes to 64 bits: two vectors share a value with probability 2^−64.

    The upper halves of two multilinear hashes modulo 2^64; the lower halves of one are weak.

    Args:
        vectors: contiguous float32 [n, D].

    Returns:
        int64 [n].
    """
    words = vectors.view(np.uint32).reshape(len(vectors), -1)
    factors = np.random.default_rng(0).integers(0, 2**64, (words.shape[1], 2), dtype=np.uint64)
    out = np.empty(len(words), dtype=np.uint64)
    for start in range(0, len(words), _HASH_ROWS):
        sums = words[start : start + _HASH_ROWS].astype(np.uint64) @ factors
        high = sums >> np.uint64(32)
        out[start : start + _HASH_ROWS] = (high[:, 0] << np.uint64(32)) | high[:, 1]
    return out.view(np.int64)


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest entries of each of Q queries, best first."""

    scores: Floats
    """[Q, k] inner products; −inf in empty places."""
    names: Integers
    """[Q, k] which entry."""
    sizes: Integers
    """[Q, k] items on it; 0 in empty places."""


def search(entries: Entries, queries: Floats, k: int, *, method: Method) -> Neighbours:
    """Find the k entries of largest inner product.

    Args:
        entries: the gallery.
        queries: unit vectors [Q, D].
        k: entries wanted; fewer come from a small gallery, or where HNSW finds fewer.
        method: exact, or hnsw (M 16, construction depth 256) for large galleries.
    """
    k = min(k, len(entries.names))
    if method == "exact":
        scores, rows = faiss.knn(queries, entries.vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexHNSWFlat(queries.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 256
        index.hnsw.efSearch = max(50, 2 * k)
        index.add(entries.vectors)
        scores, rows = index.search(queries, k)
    is_found = rows >= 0
    return Neighbours(
        scores=np.where(is_found, scores, -np.inf).astype(np.float32),
        names=np.where(is_found, entries.names[rows], 0),
        sizes=np.where(is_found, entries.sizes[rows], 0),
    )


def merge_neighbours(first: Neighbours, second: Neighbours, k: int) -> Neighbours:
    """The k nearest entries of two shards; an entry found in both keeps one place.

    Args:
        first: neighbours in one shard, or already merged ones [Q, a].
        second: neighbours of the same queries in another [Q, b].
        k: entries to keep.
    """
    scores = np.concatenate([first.scores, second.scores], axis=1)
    names = np.concatenate([first.names, second.names], axis=1)
    sizes = np.concatenate([first.sizes, second.sizes], axis=1)
    # Empty places have name 0 and nothing to add; they may merge with each other.
    order = np.argsort(names, axis=1, kind="stable")
    names = np.take_along_axis(names, order, axis=1)
    scores = np.take_along_axis(scores, order, axis=1)
    sizes = np.take_along_axis(sizes, order, axis=1)
    is_twin = names[:, 1:] == names[:, :-1]
    sizes[:, :-1] += np.where(is_twin, sizes[:, 1:], 0)
    # Either shard may round the same product differently: keep the larger.
    scores[:, :-1] = np.where(is_twin, np.maximum(scores[:, :-1], scores[:, 1:]), scores[:, :-1])
    for part, empty in ((names, 0), (scores, -np.inf), (sizes, 0)):
        part[:, 1:][is_twin] = empty
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Neighbours(*(np.take_along_axis(part, best, axis=1) for part in (scores, names, sizes)))
