"""What shards say of themselves, and how hashes of held-out queries are told apart."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data import tasks
from forge_ray.data.queries.output import WRITTEN, collected, written
from forge_ray.data.sorted_arrays import is_member

NUMBERS = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20), max_size=12)


@given(st.lists(st.tuples(st.sampled_from(["validation", "test"]), NUMBERS), max_size=5))
def test_shards_add_up(shards: list[tuple[str, list[int]]]) -> None:
    ledger = tasks.Ledger()
    ledger.add("no_text", 2, "an item without")
    said = [written(split, len(pairs), np.array(pairs, np.uint64)) for split, pairs in shards]
    said += [written("train", 0), tasks.ledger_rows(WRITTEN, ledger), WRITTEN.empty_table()]
    pairs, counted = collected(said)
    assert pairs.tolist() == sorted({pair for _, pairs in shards for pair in pairs})
    for split in ("validation", "test", "train"):
        assert counted.rows[split] == sum(len(pairs) for one, pairs in shards if one == split)
    assert counted.ledger.counts == {"no_text": 2}


@given(NUMBERS, NUMBERS)
def test_known_pairs_are_found(pairs: list[int], known: list[int]) -> None:
    found = is_member(np.array(pairs, np.uint64), np.unique(np.array(known, np.uint64)))
    assert found.tolist() == [pair in known for pair in pairs]
