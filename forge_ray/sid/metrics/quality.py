"""What the code table alone says about itself: collisions, concentration, usage of the codebooks.

Knows codes and codebook sizes. Knows nothing about vectors or interactions, and therefore cannot
tell a meaningful table from the same table with its rows permuted: use these figures as gates and
rank survivors by `backoff` and by trained generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PrefixIds:
    """Dense numbers of the distinct SID prefixes of every depth 1..L.

    Numbers follow the lexicographic order of the prefixes, so the last depth sorts the SIDs.
    """

    ids: tuple[npt.NDArray[np.int64], ...]
    """int64 [N] for each depth: which distinct prefix the item has."""
    counts: tuple[int, ...]
    """Number of distinct prefixes for each depth."""


def prefix_ids(codes: npt.NDArray[np.integer[Any]]) -> PrefixIds:
    """Number the distinct prefixes of every depth with one sort of the table.

    Args:
        codes: integer codes [N, L]. Any number of levels: no key is packed, nothing overflows.
    """
    num_items, num_levels = codes.shape
    order = np.lexsort(codes.T[::-1])
    is_new = np.zeros(num_items, dtype=bool)
    found = []
    counts = []
    for level in range(num_levels):
        column = codes[order, level]
        is_new[1:] |= column[1:] != column[:-1]
        ranked = np.cumsum(is_new, dtype=np.int64)
        ids = np.empty(num_items, dtype=np.int64)
        ids[order] = ranked
        found.append(ids)
        counts.append(int(ranked[-1]) + 1 if num_items else 0)
    return PrefixIds(tuple(found), tuple(counts))


def gini_histogram(
    sizes: npt.NDArray[np.integer[Any]], multiplicity: npt.NDArray[np.integer[Any]]
) -> float:
    """Gini coefficient of bucket sizes given as a histogram, exact for any number of buckets.

    `G = Σ_i (2i − n − 1)·s_(i) / (n·S)` over the n occupied buckets in ascending size order, with
    S the number of items; buckets of one size enter as one arithmetic series.

    Args:
        sizes: distinct bucket sizes [H] > 0, ascending.
        multiplicity: buckets of each size [H] > 0.

    Returns:
        0 when all buckets are equal (or there is none), towards 1 when few buckets hold all items.

    Source: FORGE, arXiv 2509.20904, Gini over occupied SIDs; empty SIDs are not counted.
    """
    # Python integers: with 10^8 buckets the series passes 2^63.
    size, count = sizes.astype(object), multiplicity.astype(object)
    num_buckets, num_items = int(count.sum()), int((size * count).sum())
    if num_items == 0:
        return 0.0
    before = np.cumsum(count) - count
    series = size * count * (2 * before + count - num_buckets)
    return float(int(series.sum()) / (num_buckets * num_items))


def gini(counts: npt.NDArray[np.integer[Any]]) -> float:
    """Gini coefficient of bucket sizes; empty buckets are ignored. See `gini_histogram`.

    Args:
        counts: items per bucket [S], any order.
    """
    sizes, multiplicity = np.unique(counts[counts > 0], return_counts=True)
    return gini_histogram(sizes, multiplicity)


@dataclass(frozen=True)
class LevelUsage:
    """How one level uses its codebook of K codes."""

    used: float
    """Codes with at least one item / K."""
    dead: int
    """Codes without an item."""
    entropy: float
    """−Σ p log p / log K over the item shares p of the codes; 1 = even. 0 when K is 1."""
    perplexity: float
    """exp(−Σ p log p): effective number of codes, 1..K."""
    prefixes: int
    """Distinct prefixes that end at this level."""


@dataclass(frozen=True)
class QualityReport:
    """Symbol statistics of one code table; see the fields."""

    num_items: int
    """Items N."""
    num_sids: int
    """Distinct (occupied) SIDs."""
    uniqueness: float
    """Distinct SIDs / N (the literature's ICR, or U)."""
    gini: float
    """Gini of items over occupied SIDs, lower is better."""
    colliding_items: float
    """Share of items that share their SID; differs from 1 − uniqueness."""
    max_bucket: int
    """Items on the fullest SID."""
    mean_bucket: float
    """N / distinct SIDs."""
    max_group: int
    """Items under the fullest prefix of length L − 1: a last-level resolver needs this many codes.
    """
    levels: tuple[LevelUsage, ...]
    """One entry per level."""

    def to_metrics(self) -> dict[str, float]:
        """Flatten into `name -> value`; levels count from 1, as in `usage_level_1`."""
        flat: dict[str, float] = {
            "num_items": self.num_items,
            "num_sids": self.num_sids,
            "uniqueness": self.uniqueness,
            "gini": self.gini,
            "colliding_items": self.colliding_items,
            "max_bucket": self.max_bucket,
            "mean_bucket": self.mean_bucket,
            "max_group": self.max_group,
        }
        for number, level in enumerate(self.levels, start=1):
            flat[f"usage_level_{number}"] = level.used
            flat[f"dead_level_{number}"] = level.dead
            flat[f"entropy_level_{number}"] = level.entropy
            flat[f"perplexity_level_{number}"] = level.perplexity
            flat[f"prefixes_{number}"] = level.prefixes
        return flat


def symbol_quality(
    codes: npt.NDArray[np.integer[Any]],
    codebook_sizes: Sequence[int],
    *,
    prefixes: PrefixIds | None = None,
) -> QualityReport:
    """Measure collisions, concentration and codebook usage of a code table. O(N·L), one sort.

    Args:
        codes: integer codes [N, L], N >= 1, each in `0..codebook_sizes[l] − 1`.
        codebook_sizes: codes per level, length L.
        prefixes: `prefix_ids(codes)` when the caller has them already.
    """
    prefixes = prefix_ids(codes) if prefixes is None else prefixes
    num_items, num_levels = codes.shape
    buckets = np.bincount(prefixes.ids[-1])
    groups = np.bincount(prefixes.ids[-2]) if num_levels > 1 else np.array([num_items])
    return QualityReport(
        num_items=num_items,
        num_sids=len(buckets),
        uniqueness=len(buckets) / num_items,
        gini=gini(buckets),
        colliding_items=float(buckets[buckets > 1].sum() / num_items),
        max_bucket=int(buckets.max()),
        mean_bucket=num_items / len(buckets),
        max_group=int(groups.max()),
        levels=tuple(
            _level_usage(codes[:, level], int(codebook_sizes[level]), prefixes.counts[level])
            for level in range(num_levels)
        ),
    )


def _level_usage(column: npt.NDArray[np.integer[Any]], size: int, prefixes: int) -> LevelUsage:
    counts = np.bincount(column, minlength=size)
    share = counts[counts > 0] / len(column)
    nats = float(-(share * np.log(share)).sum()) + 0.0  # + 0.0: a single code gives −0.0
    return LevelUsage(
        used=len(share) / size,
        dead=size - len(share),
        entropy=nats / float(np.log(size)) if size > 1 else 0.0,
        perplexity=float(np.exp(nats)),
        prefixes=prefixes,
    )
