"""Resolvers as their definitions read: plain Python, one item at a time, nothing clever."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forge_ray.data.hashing import hash_ids
from forge_ray.sid.resolvers import Resolution, ResolverConfig, resolve

Sid = tuple[int, ...]


@dataclass(frozen=True)
class Catalogue:
    """Skewed codes of some items, and everything a resolver may ask about them."""

    codes: np.ndarray
    sizes: tuple[int, ...]
    ids: np.ndarray
    counts: np.ndarray
    distances: np.ndarray

    @classmethod
    def draw(cls, seed: int, num_items: int, sizes: tuple[int, ...] = (3, 2, 6)) -> Catalogue:
        rng = np.random.default_rng(seed)
        codes = np.minimum(
            rng.geometric(0.6, size=(num_items, len(sizes))) - 1, np.array(sizes) - 1
        )
        distances = rng.random((num_items, sizes[-1])).astype(np.float32) + 0.1
        # As a quantizer gives them: the own code is the nearest.
        distances[np.arange(num_items), codes[:, -1]] = 0.05
        ids = rng.permutation(10 * num_items)[:num_items].astype(str).astype(object)
        return cls(codes, sizes, ids, rng.integers(0, 4, num_items), distances)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def wishes(self) -> np.ndarray:
        """All last codes of every item, nearest first."""
        return np.argsort(self.distances, axis=1, kind="stable")

    def take(self, rows: np.ndarray | slice) -> Catalogue:
        return Catalogue(
            self.codes[rows], self.sizes, self.ids[rows], self.counts[rows], self.distances[rows]
        )

    def resolve(self, config: ResolverConfig, published: np.ndarray | None = None) -> Resolution:
        wishes = self.wishes
        return resolve(
            config,
            self.codes,
            self.sizes,
            item_ids=self.ids,
            train_counts=self.counts,
            candidates=lambda rows, limit: wishes[rows, :limit],
            distances=lambda rows: self.distances[rows],
            published=published,
        )

    def ranked(self) -> list[int]:
        """Rows in the order of their id hashes."""
        hashes = hash_ids(self.ids).tolist()
        return sorted(range(len(self)), key=hashes.__getitem__)


def occupancy(codes: np.ndarray) -> Counter[Sid]:
    return Counter(map(tuple, codes.tolist()))


def capped(
    case: Catalogue, wishes: Sequence[Sequence[int]], *, cap: int, limit: int, order: str
) -> np.ndarray:
    """FORGE's policy, one item at a time."""
    count: Counter[Sid] = Counter()
    pool, out = [], case.codes.copy()
    for row in case.ranked():
        sid = tuple(case.codes[row])
        if count[sid] < cap:
            count[sid] += 1
        else:
            pool.append(row)
    options = {row: [c for c in wishes[row] if c != case.codes[row, -1]][:limit] for row in pool}

    def attempt(row: int, code: int) -> bool:
        sid = (*case.codes[row, :-1], code)
        if count[sid] >= cap:
            return False
        count[sid] += 1
        out[row, -1] = code
        return True

    if order == "row":
        for row in pool:
            any(attempt(row, code) for code in options[row])
        return out
    for p in range(limit):
        pool = [row for row in pool if p >= len(options[row]) or not attempt(row, options[row][p])]
    return out


def numbered(case: Catalogue, *, by_count: bool) -> np.ndarray:
    """The appended level: 0, 1, 2, … inside each SID."""
    rows = case.ranked()
    if by_count:
        rows = sorted(rows, key=lambda row: -int(case.counts[row]))
    seen: Counter[Sid] = Counter()
    number = np.zeros(len(case), dtype=np.int64)
    for row in rows:
        number[row] = seen[tuple(case.codes[row])]
        seen[tuple(case.codes[row])] += 1
    return number


def fewest_changes(case: Catalogue) -> dict[Sid, tuple[int, float]]:
    """Fewest changed items and their smallest total distance, by prefix, by trying everything."""
    groups: dict[Sid, list[int]] = defaultdict(list)
    for row, sid in enumerate(map(tuple, case.codes.tolist())):
        groups[sid[:-1]].append(row)
    best = {}
    for prefix, rows in groups.items():
        if len(rows) > case.sizes[-1]:
            continue
        best[prefix] = min(
            (
                sum(code != case.codes[row, -1] for row, code in zip(rows, codes, strict=True)),
                sum(
                    float(case.distances[row, code]) for row, code in zip(rows, codes, strict=True)
                ),
            )
            for codes in itertools.permutations(range(case.sizes[-1]), len(rows))
        )
    return best
