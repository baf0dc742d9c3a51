"""Pairs against a count by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.cooccurrence import count_pairs, merge_counts
from forge_ray.data.pairs import PairsConfig, strongest
from forge_ray.data.ragged import Ragged

LOGS = st.lists(st.lists(st.integers(0, 6), max_size=7), min_size=1, max_size=6)


def by_hand(log: list[list[int]], window: int) -> Counter[tuple[int, int]]:
    counts: Counter[tuple[int, int]] = Counter()
    for user in log:
        for i, first in enumerate(user):
            for second in user[i + 1 : i + 1 + window]:
                if first != second:
                    counts[first, second] += 1
                    counts[second, first] += 1
    return counts


@settings(deadline=None)
@given(log=LOGS, window=st.integers(1, 4))
def test_counts_and_merge(log: list[list[int]], window: int) -> None:
    expected = by_hand(log, window)
    halves = [log[::2], log[1::2]]
    parts = [
        count_pairs(Ragged.from_lists(half, dtype=np.int32), window=window, num_items=7)
        for half in halves
    ]
    merged = merge_counts(
        np.concatenate([part.keys for part in parts]), np.concatenate([p.counts for p in parts])
    )
    got = {divmod(int(k), 7): int(c) for k, c in zip(merged.keys, merged.counts, strict=True)}
    assert got == dict(expected)


def test_keeps_the_strongest_partners() -> None:
    log = [[0, 1], [0, 1], [0, 2], [0, 3], [3, 4], [3, 5]]
    items = Ragged.from_lists(log, dtype=np.int32)
    counts = np.bincount(items.values, minlength=6)
    pairs = count_pairs(items, window=2, num_items=6)
    table = strongest(pairs, counts, PairsConfig(top_k=2)).to_pydict()
    rows = list(zip(table["anchor"], table["positive"], table["weight"], strict=True))
    of_zero = [(p, round(w, 4)) for a, p, w in rows if a == 0]
    assert of_zero == [(1, round(2 / np.sqrt(8), 4)), (2, round(1 / np.sqrt(4), 4))]
    assert max(Counter(table["anchor"]).values()) == 2
    frequent = strongest(pairs, counts, PairsConfig(min_count=2)).to_pydict()
    assert list(zip(frequent["anchor"], frequent["positive"], strict=True)) == [(0, 1), (1, 0)]
