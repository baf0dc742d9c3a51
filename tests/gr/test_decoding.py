"""How users are put into searches: what that costs, and that it changes no list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forge_ray.data.ragged import Ragged
from forge_ray.gr import decoding
from forge_ray.gr.beam import Beams, default_widths
from forge_ray.gr.buckets import ItemBuckets, RankedItems
from forge_ray.gr.decoding import SidDecoder, without_seen
from forge_ray.sid.table import SidTable
from tests.gr.generators import HashGenerator, random_codes


class NotedGenerator(HashGenerator):
    """Notes the users and the beams of each search."""

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        super().__init__(codebook_sizes)
        self.searches: list[tuple[int, int]] = []

    def step(
        self, state: Tensor, parents: Tensor, codes: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        if level == 1:
            self.searches.append((len(parents), parents.shape[1]))
        return super().step(state, parents, codes, level)


def single_table(num_items: int) -> SidTable:
    """A prefix of one code owns one SID, so that a search finds as many as it carries."""
    firsts = np.random.default_rng(0).permutation(num_items)
    return SidTable.from_codes(np.column_stack([firsts, firsts % 2]), (num_items, 2))


def seen(lengths: Sequence[int], num_items: int) -> Ragged:
    rng = np.random.default_rng(1)
    return Ragged.from_lists([rng.permutation(num_items)[:size] for size in lengths], np.int64)


def test_wider_searches_take_fewer_users_by_the_square() -> None:
    table = single_table(1000)
    model = NotedGenerator(table.codebook_sizes)
    decoder = SidDecoder(
        model, table, widths=default_widths(2, max_k=50), max_history=5, batch_users=16, fills=50
    )
    decoder.decode(seen([150] * 12, 1000))
    searches = [one for one in model.searches if one[1] > 50]
    assert sum(users for users, _ in searches) == 12
    assert all(beams == 200 and users * beams**2 <= 16 * 50**2 for users, beams in searches)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Beams]:
    """What each search found, in order."""
    found: list[Beams] = []

    def noted(*args: Any, **kwargs: Any) -> Beams:
        found.append(beam_search(*args, **kwargs))
        return found[-1]

    beam_search = decoding.beam_search
    monkeypatch.setattr(decoding, "beam_search", noted)
    return found


def lists_of(decoder: SidDecoder, histories: Ragged, k: int) -> RankedItems:
    rank = decoder.item_rank()
    counts = np.zeros(len(rank), np.int64)
    buckets = ItemBuckets.build(rank, num_sids=decoder.index.num_sids, train_counts=counts)
    decoded = decoder.decode(histories)
    return buckets.expand(decoded.sid_rank, decoded.scores, k=k, seen=histories)


@pytest.mark.parametrize("denies", [False, True])
def test_a_long_history_widens_its_own_batch_alone(denies: bool, searches: list[Beams]) -> None:
    """And lists are those of rankings that hold every SID, the seen ones too."""
    sizes = (8, 8, 32)
    table = SidTable.from_codes(random_codes(1500, sizes), sizes)
    histories = seen([300, *range(40)], 1500)
    options: dict[str, Any] = {"max_history": 5, "batch_users": 4}
    if denies:
        options["allowed"] = np.random.default_rng(2).random(1500) < 0.8
    decoder = SidDecoder(HashGenerator(sizes), table, widths=(50, 50, 100), fills=20, **options)
    lists = lists_of(decoder, histories, 20)
    assert [found.sid_rank.shape[1] for found in searches] == [350] + [100] * 10
    assert decoder.decode(histories).sid_rank.shape == (41, 20)
    whole = SidDecoder(HashGenerator(sizes), table, widths=(50, 50, 1500), **options)
    expected = lists_of(whole, histories, 20)
    np.testing.assert_array_equal(lists.items, expected.items)
    np.testing.assert_array_equal(lists.scores, expected.scores)
    assert (lists.lengths == 20).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12))
def test_rankings_without_seen_equal_a_loop(seed: int, num_sids: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    rank = rng.integers(-1, num_sids, 30)
    ranks = np.stack([rng.permutation(num_sids) for _ in range(4)])
    ranks[np.arange(num_sids) >= rng.integers(0, num_sids + 1, 4)[:, None]] = -1
    scores = -rng.random(ranks.shape).astype(np.float32)
    items = [np.unique(rng.integers(0, 30, rng.integers(0, 40))) for _ in range(4)]
    sizes = np.bincount(rank[rank >= 0], minlength=num_sids)
    known = Ragged.from_lists([rank[one] for one in items], np.int64)
    left, values = without_seen(ranks, scores, known, sizes, width=width)
    for user in range(4):
        kept = [
            (sid, score)
            for sid, score in zip(ranks[user], scores[user], strict=True)
            if sid >= 0 and (sizes[sid] == 0 or set(np.flatnonzero(rank == sid)) - {*items[user]})
        ][:width]
        missing = width - len(kept)
        assert left[user].tolist() == [sid for sid, _ in kept] + [-1] * missing
        assert values[user].tolist() == [score for _, score in kept] + [-np.inf] * missing


def test_users_who_need_more_sids_than_beams_are_searched_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a prefix owns one SID, the first of two searches would be in vain."""
    table, histories = single_table(1000), seen([0, 0, *range(60), 400], 1000)
    found = {}
    for most in (decoding.HARDLY_BRANCHES, 0.0):
        monkeypatch.setattr(decoding, "HARDLY_BRANCHES", most)
        model = NotedGenerator(table.codebook_sizes)
        decoder = SidDecoder(
            model, table, widths=default_widths(2, max_k=50), max_history=5, fills=50
        )
        found[most] = decoder.decode(histories)
        # Three have no history, and 50 beams are enough for them.
        twice = 0 if most else 60
        assert sum(users for users, _ in model.searches) == len(histories) + twice
    once, again = found.values()
    np.testing.assert_array_equal(once.sid_rank, again.sid_rank)
    np.testing.assert_array_equal(once.scores, again.scores)
    assert once.num_emitted == again.num_emitted


def test_a_search_that_was_done_again_is_not_counted(searches: list[Beams]) -> None:
    sizes = (16, 16, 4)
    table = SidTable.from_codes(random_codes(600, sizes), sizes)
    decoder = SidDecoder(
        HashGenerator(sizes), table, widths=default_widths(3, max_k=50), max_history=5, fills=50
    )
    decoded = decoder.decode(seen([300], 600))
    first, second = (int(found.is_live.sum()) for found in searches)
    assert first < decoded.num_emitted == second
    assert decoded.num_invalid == 0
