"""Which items embedding hitrate searches, and where their vectors come from, shard by shard.

Knows vector shards on disk and quantizers; knows nothing about histories or metrics. Sources are
sent to workers, so they hold codes and file names, never a whole catalogue of vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from forge_ray.embed.vectors import VectorSet
from forge_ray.sid.metrics.neighbours import ArrayGallery, Floats, GallerySource, Integers
from forge_ray.sid.metrics.quality import prefix_ids

if TYPE_CHECKING:
    from forge_ray.sid.quantizers.base import Quantizer


def choose_items(
    listed: npt.NDArray[np.integer[Any]], num_items: int, *, limit: int, seed: int
) -> Integers:
    """Choose the searched items: those of the scored lists first, then a uniform sample.

    A uniform sample alone of a large catalogue would miss nearly every target.

    Args:
        listed: items of the scored lists, distinct.
        num_items: catalogue size N.
        limit: most items to choose.
        seed: fixes the sample.

    Returns:
        int64 [min(N, limit)] in index order; takes 9 bytes for each of N items meanwhile.
    """
    rng = np.random.default_rng(seed)
    limit = min(limit, num_items)
    is_chosen = np.zeros(num_items, dtype=bool)
    is_chosen[_draw(listed, limit, rng)] = True
    is_chosen[_draw(np.flatnonzero(~is_chosen), limit - int(is_chosen.sum()), rng)] = True
    return np.flatnonzero(is_chosen)


def _draw(
    items: npt.NDArray[np.integer[Any]], limit: int, rng: np.random.Generator
) -> npt.NDArray[np.integer[Any]]:
    if len(items) <= limit:
        return items
    return items[rng.choice(len(items), size=limit, replace=False, shuffle=False)]


def raw_gallery(vectors: VectorSet, items: Integers, *, shard_items: int) -> GallerySource:
    """The item vectors themselves: in memory when one shard holds them, else read by shard.

    Args:
        vectors: a vector space.
        items: searched items in index order.
        shard_items: most items of one shard. Files are not cut, so a shard holds at least one.
    """
    if len(items) <= shard_items:
        return ArrayGallery(items, vectors.take(items))
    # Files of one space are of similar size.
    per_shard = max(1, shard_items * len(vectors.files) // vectors.num_items)
    starts = range(0, len(vectors.files), per_shard)
    return FileGallery(
        vectors, items, tuple(vectors.files[start : start + per_shard] for start in starts)
    )


@dataclass(frozen=True, eq=False)
class FileGallery:
    """Vectors of chosen items, read from the files of a space."""

    vectors: VectorSet
    items: Integers
    """Chosen items in index order."""
    groups: tuple[tuple[str, ...], ...]
    """Files of each shard."""

    @property
    def num_shards(self) -> int:
        """See `GallerySource`."""
        return len(self.groups)

    @property
    def num_items(self) -> int:
        """See `GallerySource`."""
        return len(self.items)

    def load(self, shard: int) -> tuple[Integers, Floats]:
        """See `GallerySource`."""
        part = replace(self.vectors, files=self.groups[shard])
        chosen = list(self._chosen(part))
        items = [one[0] for one in chosen] or [np.empty(0, dtype=np.int64)]
        vectors = [one[1] for one in chosen] or [np.empty((0, part.dim), dtype=np.float32)]
        return np.concatenate(items), np.concatenate(vectors)

    def _chosen(self, part: VectorSet) -> Iterator[tuple[Integers, Floats]]:
        for batch in part.batches():
            at = np.minimum(np.searchsorted(self.items, batch.indices), len(self.items) - 1)
            is_chosen = self.items[at] == batch.indices
            yield batch.indices[is_chosen], batch.vectors[is_chosen]


@dataclass(frozen=True, eq=False)
class DecodedGallery:
    """What SIDs, or their first codes, stand for; each distinct one of a shard is decoded once."""

    items: Integers
    codes: npt.NDArray[np.integer[Any]]
    """[n, l] codes of the items, as many levels as are to be decoded."""
    quantizer: Quantizer
    output: Literal["decoded", "codes"]
    """The decoder's output, or the plain sum of codewords."""
    shard_items: int

    @property
    def num_shards(self) -> int:
        """See `GallerySource`."""
        return max(1, -(-len(self.items) // self.shard_items))

    @property
    def num_items(self) -> int:
        """See `GallerySource`."""
        return len(self.items)

    def load(self, shard: int) -> tuple[Integers, Floats]:
        """See `GallerySource`."""
        rows = slice(shard * self.shard_items, (shard + 1) * self.shard_items)
        return self.items[rows], restore(self.quantizer, self.codes[rows], output=self.output)


def restore(
    quantizer: Quantizer,
    codes: npt.NDArray[np.integer[Any]],
    *,
    output: Literal["decoded", "codes"] = "decoded",
) -> Floats:
    """Vectors that SIDs stand for, each distinct SID decoded once.

    Args:
        quantizer: the one that gave the codes.
        codes: integer codes [n, l], the first l levels.
        output: the decoder's output [n, D], or the plain sum of codewords [n, d].
    """
    ids = prefix_ids(codes)
    first = np.empty(ids.counts[-1], dtype=np.int64)
    first[ids.ids[-1]] = np.arange(len(codes))
    distinct = np.asarray(codes[first])
    found = quantizer.decode(distinct) if output == "decoded" else quantizer.codeword_sum(distinct)
    return found[ids.ids[-1]]
