"""What the code table alone says about itself: collisions, concentration, usage of the codebooks.

Knows codes and codebook sizes. Knows nothing about vectors or interactions, and therefore cannot
tell a meaningful table from the same table with its rows permuted: use these figures as gates and
rank survivors by `backoff` and by trained generators.

Everything comes from one sort of packed keys and the lengths of its runs. Passes over the rows run
in blocks that stay in the processor's cache, which makes them cheap beside the sort.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.threads import map_threads

Integers = npt.NDArray[np.integer[Any]]

_BLOCK = 1 << 16
"""Rows of one pass: half a megabyte of keys, inside the second-level cache."""
_THREAD_ROWS = 16 * _BLOCK
"""Rows that one thread packs at a time."""
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class PrefixIds:
    """Dense numbers of the distinct SID prefixes of every depth 1..L.

    Numbers follow the lexicographic order of the prefixes, so the last depth sorts the SIDs.
    """

    ids: tuple[npt.NDArray[np.int64], ...]
    """int64 [N] for each depth: which distinct prefix the item has."""
    counts: tuple[int, ...]
    """Number of distinct prefixes for each depth."""


def prefix_ids(codes: Integers) -> PrefixIds:
    """Number the distinct prefixes of every depth with one sort of the table.

    Memory: 24 bytes an item while sorting, then 8 for each depth.

    Args:
        codes: integer codes [N, L], >= 0. Any number of levels: tables whose keys pass 63 bits are
            sorted column by column.
    """
    num_items, num_levels = codes.shape
    sizes = [int(codes[:, level].max(initial=0)) + 1 for level in range(num_levels)]
    if math.prod(sizes) > _INT64_MAX:
        return _prefix_ids_by_column(codes)
    order, keys = _sorted_with_rows(_packed(codes, sizes).keys, math.prod(sizes))
    starts = _starts(keys)
    # Only the deepest numbers are scattered over all items; a parent's number is a function of its
    # child's, looked up in a table of distinct prefixes.
    ranks = np.repeat(np.arange(len(starts), dtype=np.int64), np.diff(starts, append=num_items))
    ids = np.empty(num_items, dtype=np.int64)
    ids[order] = ranks
    found, counts = [ids], [len(starts)]
    keys = keys[starts]
    for size in reversed(sizes[1:]):
        keys = _parents(keys, size)
        starts = _starts(keys)
        parent = np.repeat(
            np.arange(len(starts), dtype=np.int64), np.diff(starts, append=len(keys))
        )
        found.append(parent[found[-1]])
        counts.append(len(starts))
        keys = keys[starts]
    return PrefixIds(tuple(found[::-1]), tuple(counts[::-1]))


def distinct_rows(codes: Integers) -> Integers:
    """Return the distinct SIDs of a table [S, L] in lexicographic order, by one sort.

    Args:
        codes: integer codes [N, L], >= 0.
    """
    ids = prefix_ids(codes)
    first = np.empty(ids.counts[-1], dtype=np.int64)
    first[ids.ids[-1]] = np.arange(len(codes))
    return np.asarray(codes[first])


def _sorted_with_rows(keys: Integers, num_keys: int) -> tuple[Integers, Integers]:
    """Rows in the order of their keys, and the sorted keys.

    Where key and row fit into 63 bits together they are sorted as one number, which is several
    times faster than `argsort`: every lookup stays in the number itself.
    """
    bits = max(1, (len(keys) - 1).bit_length())
    if num_keys << bits > _INT64_MAX:
        order = np.argsort(keys)
        return order, keys[order]
    both = keys.astype(np.int64)
    both <<= bits
    both |= np.arange(len(keys))
    both.sort()
    return both & ((1 << bits) - 1), both >> bits


def _prefix_ids_by_column(codes: Integers) -> PrefixIds:
    order = np.lexsort(codes.T[::-1])
    is_new = np.zeros(len(codes), dtype=bool)
    found, counts = [], []
    for column in codes.T:
        ranked = column[order]
        is_new[1:] |= ranked[1:] != ranked[:-1]
        ids = np.empty(len(codes), dtype=np.int64)
        ids[order] = np.cumsum(is_new, dtype=np.int64)
        found.append(ids)
        counts.append(int(is_new.sum()) + 1)
    return PrefixIds(tuple(found), tuple(counts))


def _starts(keys: Integers) -> npt.NDArray[np.int64]:
    """Places where a run of equal sorted keys begins."""
    return np.flatnonzero(~_continues(keys))


def _continues(keys: Integers) -> npt.NDArray[np.bool_]:
    """Whether each sorted key equals the one before; the first does not."""
    is_inner = np.zeros(len(keys), dtype=bool)
    np.equal(keys[1:], keys[:-1], out=is_inner[1:])
    return is_inner


def _parents(keys: Integers, size: int) -> Integers:
    """Drop the last code of each key; a shift is several times faster than a division."""
    if size & (size - 1) == 0:
        return keys >> keys.dtype.type(size.bit_length() - 1)
    return keys // keys.dtype.type(size)


@dataclass(frozen=True)
class _Packed:
    keys: Integers
    """Mixed-radix keys of whole rows [N], in the order of the rows."""
    histograms: list[npt.NDArray[np.int64]]
    """Items of each code [K_l] at the levels 2..L; sorted keys tell those of level 1."""


def _packed(codes: Integers, sizes: Sequence[int]) -> _Packed:
    """Pack rows, in 4 bytes where they fit (sorting those is twice as fast), and count codes.

    Args:
        codes: integer codes [N, L].
        sizes: codes per level, with a product below 2^63.
    """
    keys = np.empty(len(codes), dtype=np.uint32 if math.prod(sizes) <= 2**32 else np.int64)

    def pack(first: int) -> list[npt.NDArray[np.int64]]:
        histograms = [np.zeros(size, dtype=np.int64) for size in sizes[1:]]
        for start in range(first, min(first + _THREAD_ROWS, len(codes)), _BLOCK):
            # One widening copy per column serves the key and the count.
            columns = codes[start : start + _BLOCK].T.astype(np.int64, order="C")
            for level, (size, counts) in enumerate(zip(sizes[1:], histograms, strict=True), 1):
                counts += np.bincount(columns[level], minlength=size)
                columns[0] *= size
                columns[0] += columns[level]
            keys[start : start + _BLOCK] = columns[0]
        return histograms

    parts = map_threads(pack, range(0, max(1, len(codes)), _THREAD_ROWS))
    histograms = [np.sum(counts, axis=0) for counts in zip(*parts, strict=True)]
    return _Packed(keys, histograms)


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
    coverage: float
    """Distinct SIDs / SIDs that the codebooks can spell; the part of the space Gini leaves out."""
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
            "coverage": self.coverage,
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


def symbol_quality(codes: Integers, codebook_sizes: Sequence[int]) -> QualityReport:
    """Measure collisions, concentration and codebook usage of a code table. O(N·L), one sort.

    Memory: one key an item, 4 or 8 bytes.

    Args:
        codes: integer codes [N, L], N >= 1, each in `0..codebook_sizes[l] − 1`.
        codebook_sizes: codes per level, length L.
    """
    sizes = [int(size) for size in codebook_sizes]
    num_items = len(codes)
    runs = _runs(codes, sizes)
    multiplicity = runs.multiplicity
    occupied = np.flatnonzero(multiplicity)
    num_sids = runs.prefixes[-1]
    colliding = num_items - int(multiplicity[1])
    return QualityReport(
        num_items=num_items,
        num_sids=num_sids,
        uniqueness=num_sids / num_items,
        coverage=num_sids / math.prod(sizes),
        gini=gini_histogram(occupied, multiplicity[occupied]),
        colliding_items=colliding / num_items,
        max_bucket=int(occupied[-1]),
        mean_bucket=num_items / num_sids,
        max_group=runs.max_group,
        levels=tuple(
            _level_usage(counts, prefixes)
            for counts, prefixes in zip(runs.histograms, runs.prefixes, strict=True)
        ),
    )


@dataclass(frozen=True)
class _Runs:
    """Runs of equal prefixes in the sorted table."""

    prefixes: tuple[int, ...]
    """Distinct prefixes of each depth 1..L."""
    multiplicity: npt.NDArray[np.int64]
    """SIDs that hold 0, 1, 2, … items."""
    max_group: int
    """Items under the fullest prefix of length L − 1; all of them when L is 1."""
    histograms: tuple[npt.NDArray[np.int64], ...]
    """Items of each code, for every level [K_l]."""


def _runs(codes: Integers, sizes: Sequence[int]) -> _Runs:
    if math.prod(sizes) > _INT64_MAX:
        return _runs_by_column(codes, sizes)
    packed = _packed(codes, sizes)
    keys = packed.keys
    keys.sort()
    histograms = (_first_histogram(keys, sizes), *packed.histograms)
    multiplicity = np.zeros(2, dtype=np.int64)
    # Prefixes of length 1 are codes, and need no pass over the keys.
    counts = [int(np.count_nonzero(histograms[0])), *[0] * (len(sizes) - 1)]
    if len(sizes) == 1:
        occupied = histograms[0][histograms[0] > 0]
        return _Runs(tuple(counts), np.bincount(occupied, minlength=2), len(keys), histograms)
    max_group = int(histograms[0].max()) if len(sizes) == 2 else 0
    last = [-1] * len(sizes)
    for block in _whole_groups(keys, sizes[-1]):
        for depth in range(len(sizes) - 1, 0, -1):
            is_inner = _continues(block)
            # Depths L and L − 1 never continue a run of the block before; shorter ones may.
            is_inner[0] = block[0] == last[depth]
            last[depth] = block[-1]
            counts[depth] += len(block) - int(np.count_nonzero(is_inner))
            if depth == len(sizes) - 1:
                multiplicity = _add(multiplicity, _length_histogram(is_inner))
            elif depth == len(sizes) - 2:
                max_group = max(max_group, len(_length_histogram(is_inner)) - 1)
            if depth > 1:
                block = _parents(block, sizes[depth])
    return _Runs(tuple(counts), multiplicity, max_group, histograms)


def _first_histogram(keys: Integers, sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    width = math.prod(sizes[1:])
    bounds = np.arange(1, sizes[0], dtype=np.int64) * width
    ends = np.searchsorted(keys, bounds.astype(keys.dtype))
    return np.diff(ends, prepend=0, append=len(keys))


def _whole_groups(keys: Integers, size: int) -> Iterator[Integers]:
    """Cut sorted keys into blocks of about `_BLOCK` that split no group of one parent prefix."""
    start = 0
    while start < len(keys):
        end = min(start + _BLOCK, len(keys))
        # The bound in the dtype of the keys: another one would copy them all, block after block.
        bound = keys.dtype.type((int(keys[end - 1]) // size + 1) * size - 1)
        end = int(np.searchsorted(keys, bound, side="right"))
        yield keys[start:end]
        start = end


def _length_histogram(is_inner: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Count runs by their length [longest + 1]; places inside a run continue the one before."""
    inner = np.flatnonzero(is_inner)
    if 2 * len(inner) > len(is_inner):
        starts = np.flatnonzero(~is_inner)
        return np.bincount(np.diff(starts, append=len(is_inner)), minlength=2)
    # Mostly runs of 1: look only at the stretches of places inside longer runs.
    ends = np.flatnonzero(np.diff(inner, append=len(is_inner) + 1) > 1)
    longer = np.diff(ends, prepend=-1) + 1
    counts = np.bincount(longer, minlength=2)
    counts[1] = len(is_inner) - len(inner) - len(longer)
    return counts


def _add(total: npt.NDArray[np.int64], more: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Add two histograms of different lengths."""
    wide, narrow = (total, more) if len(total) >= len(more) else (more, total)
    wide[: len(narrow)] += narrow
    return wide


def _runs_by_column(codes: Integers, sizes: Sequence[int]) -> _Runs:
    found = prefix_ids(codes)
    return _Runs(
        prefixes=found.counts,
        multiplicity=np.bincount(np.bincount(found.ids[-1]), minlength=2),
        max_group=int(np.bincount(found.ids[-2]).max()),
        histograms=tuple(
            np.bincount(codes[:, level], minlength=size) for level, size in enumerate(sizes)
        ),
    )


def _level_usage(counts: npt.NDArray[np.int64], prefixes: int) -> LevelUsage:
    size = len(counts)
    share = counts[counts > 0] / counts.sum()
    nats = float(-(share * np.log(share)).sum()) + 0.0  # + 0.0: a single code gives −0.0
    return LevelUsage(
        used=len(share) / size,
        dead=size - len(share),
        entropy=nats / float(np.log(size)) if size > 1 else 0.0,
        perplexity=float(np.exp(nats)),
        prefixes=prefixes,
    )
