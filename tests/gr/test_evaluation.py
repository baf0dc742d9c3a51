"""Evaluation against loops over users, and its edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError, DataError
from forge_ray.evaluate.board import Board
from forge_ray.evaluate.ranking import distinct_items
from forge_ray.gr.decoding import SidDecoder, evaluation_mode
from forge_ray.gr.evaluation import SidRanker, evaluate_generator
from forge_ray.gr.vocab import vocab_of
from forge_ray.sid.table import SidTable
from tests.gr.generators import HashGenerator, random_codes

SIZES = (6, 5, 4)


def make_table(num_items: int, *, seed: int = 0) -> SidTable:
    return SidTable.from_codes(random_codes(num_items, SIZES, seed=seed), SIZES)


def make_users(num_users: int, num_items: int, *, seed: int = 0) -> tuple[Ragged, Ragged]:
    """Histories (some empty) and one to three targets, sometimes a seen one."""
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, num_items, rng.integers(0, 7)) for _ in range(num_users)]
    wanted = [rng.integers(0, num_items, rng.integers(1, 4)) for _ in range(num_users)]
    return Ragged.from_lists(lists, np.int64), Ragged.from_lists(wanted, np.int64)


def ranked_buckets(table: SidTable, history: np.ndarray) -> list[list[int]]:
    """All buckets of one user by brute-force score, best first."""
    generator = HashGenerator(SIZES)
    sids = sorted(set(map(tuple, table.codes.tolist())))
    row = Ragged.from_lists([history], np.int64)
    tokens, mask = vocab_of(SIZES).history_tokens(row, table.codes, 20)
    scores = generator.score(tokens, mask, torch.tensor(sids))[0]
    order = scores.sort(descending=True, stable=True).indices.tolist()
    items_of: dict[tuple[int, ...], list[int]] = {}
    for item, sid in enumerate(map(tuple, table.codes.tolist())):
        items_of.setdefault(sid, []).append(item)
    return [items_of[sids[place]] for place in order]


def expected_hit(buckets: list[list[int]], seen: set[int], target: int, k: int) -> float:
    before = 0
    for bucket in buckets:
        unseen = [item for item in bucket if item not in seen]
        if target in unseen:
            return min(len(unseen), max(0, k - before)) / len(unseen)
        before += len(unseen)
    return 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 90), st.integers(0, 1000), st.booleans())
def test_item_hit_equals_a_loop_over_users(num_items: int, seed: int, exclude: bool) -> None:
    table = make_table(num_items, seed=seed)
    histories, targets = make_users(6, num_items, seed=seed)
    found = evaluate_generator(
        HashGenerator(SIZES),
        table,
        histories,
        targets,
        train_counts=np.zeros(num_items, np.int64),
        max_history=20,
        ks=(3, 8),
        widths=(120, 120, 120),
        exclude_seen=exclude,
        batch_users=4,
    )
    for k in (3, 8):
        hits = []
        for user in range(6):
            buckets = ranked_buckets(table, histories.row(user))
            seen = set(histories.row(user).tolist()) if exclude else set()
            wanted = set(targets.row(user).tolist())
            hits.append(np.mean([expected_hit(buckets, seen, item, k) for item in wanted]))
        assert found[f"ItemHit@{k}"] == pytest.approx(np.mean(hits), abs=1e-12)
        assert found[f"SidHit@{k}"] >= found[f"ItemHit@{k}"] - 1e-12 or exclude
    assert found["invalid_rate"] == 0


def test_without_collisions_expectation_and_list_agree() -> None:
    table = SidTable.from_codes(np.unique(random_codes(200, SIZES), axis=0), SIZES)
    histories, targets = make_users(50, table.num_items)
    counts = np.arange(table.num_items)
    found = evaluate_generator(
        HashGenerator(SIZES), table, histories, targets,
        train_counts=counts, max_history=20, ks=(5, 10),
    )  # fmt: skip
    for k in (5, 10):
        assert found[f"ItemHit@{k}"] == pytest.approx(found[f"HR@{k}"])
        assert found[f"ItemNDCG@{k}"] == pytest.approx(found[f"ListNDCG@{k}"])
    assert found["users"] == 50
    assert max(found["users/head"], found.get("users/tail", 0)) <= 50
    assert 0 < found["coverage@5"] <= found["coverage@10"] <= 1


def test_a_target_in_the_history_is_a_miss() -> None:
    table = make_table(60)
    histories = Ragged.from_lists([[3, 4]], np.int64)
    targets = Ragged.from_lists([[4]], np.int64)
    options = {"train_counts": np.ones(60, np.int64), "max_history": 5, "ks": (60,)}
    kept = evaluate_generator(
        HashGenerator(SIZES), table, histories, targets, exclude_seen=False, **options
    )
    hidden = evaluate_generator(HashGenerator(SIZES), table, histories, targets, **options)
    assert kept["ItemHit@60"] == 1
    assert hidden["ItemHit@60"] == hidden["HR@60"] == hidden["SidHit@60"] == 0


def test_seen_items_older_than_the_window_are_still_excluded() -> None:
    table = make_table(30)
    history = list(range(20))
    found = evaluate_generator(
        HashGenerator(SIZES), table,
        Ragged.from_lists([history], np.int64), Ragged.from_lists([[0]], np.int64),
        train_counts=np.ones(30, np.int64), max_history=2, ks=(30,),
    )  # fmt: skip
    assert found["ItemHit@30"] == 0
    assert found["coverage@30"] == pytest.approx(10 / 30)
    assert found["short_rate"] == 1


def test_seen_items_of_long_histories_do_not_shorten_lists() -> None:
    sizes = (8, 8, 8)
    table = SidTable.from_codes(np.argwhere(np.ones(sizes, dtype=bool)), sizes)
    rng = np.random.default_rng(0)
    order = rng.permutation(512)
    users = [order[:300], order[:5]]
    wanted = [order[300:450], order[200:350]]
    counts = np.ones(512, np.int64)

    def scored(rows: list[int], widths: tuple[int, ...] | None = None) -> dict[str, float]:
        return evaluate_generator(
            HashGenerator(sizes), table,
            Ragged.from_lists([users[row] for row in rows], np.int64),
            Ragged.from_lists([wanted[row] for row in rows], np.int64),
            train_counts=counts, max_history=5, ks=(50,), widths=widths,
        )  # fmt: skip

    both = scored([0, 1])
    assert both["short_rate"] == 0
    assert scored([0, 1], (50, 50, 100))["short_rate"] == 0.5
    # Room that one user needs says nothing about another.
    alone = [scored([row]) for row in (0, 1)]
    assert scored([1], (50, 50, 100))["ItemHit@50"] == alone[1]["ItemHit@50"] > 0
    for name in ("ItemHit@50", "ItemNDCG@50", "SidHit@50"):
        assert both[name] == pytest.approx(np.mean([one[name] for one in alone]))


def test_batches_of_users_add_up() -> None:
    table = make_table(150)
    histories, targets = make_users(40, 150)
    counts = np.zeros(150, np.int64)
    decoder = SidDecoder(
        HashGenerator(SIZES), table, widths=(6, 30, 60), max_history=20, batch_users=7
    )
    ranker = SidRanker(decoder, train_counts=counts, ks=(5, 10))
    wanted = distinct_items(targets, 150)

    def board(rows: np.ndarray) -> Board:
        found = Board(counts, (5, 10), bootstrap=20)
        part = wanted.take(rows)
        found.add(rows, part, ranker.rank(histories.take(rows), part), counts)
        return found

    whole, parts = board(np.arange(40)), Board(counts, (5, 10), bootstrap=20)
    for rows in np.array_split(np.arange(40), 3):
        parts.merge(board(rows))
    one, other = whole.summary(), parts.summary()
    assert one.keys() == other.keys()
    for name in one.keys() - {"users_per_s"}:
        assert one[name] == pytest.approx(other[name], nan_ok=True), name


def test_hr_is_the_macro_hit_rate_of_forge() -> None:
    """SIDs replaced by their items in popularity order; share of a user's items among the first."""
    table = make_table(40, seed=3)
    histories, targets = make_users(12, 40, seed=3)
    counts = np.random.default_rng(0).integers(0, 9, 40)
    found = evaluate_generator(
        HashGenerator(SIZES), table, histories, targets, exclude_seen=False,
        train_counts=counts, max_history=20, ks=(3, 8), widths=(120, 120, 120),
    )  # fmt: skip
    for k in (3, 8):
        shares = []
        for user in range(12):
            buckets = ranked_buckets(table, histories.row(user))
            listed = [i for one in buckets for i in sorted(one, key=lambda i: (-counts[i], i))]
            wanted = set(targets.row(user).tolist())
            shares.append(len(wanted & set(listed[:k])) / len(wanted))
        assert found[f"HR@{k}"] == pytest.approx(np.mean(shares))


def test_unconstrained_decoding_reports_invalid_sids() -> None:
    table = make_table(20)
    histories, targets = make_users(10, 20)
    found = evaluate_generator(
        HashGenerator(SIZES), table, histories, targets, constrained=False,
        train_counts=np.zeros(20, np.int64), max_history=20, ks=(5,), widths=(6, 30, 120),
    )  # fmt: skip
    num_sids = len(np.unique(table.codes, axis=0))
    assert found["invalid_rate"] == pytest.approx(1 - num_sids / 120)


def test_too_few_beams_for_the_lists_are_refused() -> None:
    table = make_table(60)
    histories, targets = make_users(2, 60)
    with pytest.raises(ConfigError, match=r"widths must end in at least max\(ks\)=20 beams"):
        evaluate_generator(
            HashGenerator(SIZES), table, histories, targets,
            train_counts=np.zeros(60, np.int64), max_history=5, ks=(20,), widths=(5, 5, 5),
        )  # fmt: skip


def test_histories_and_targets_must_match() -> None:
    table = make_table(60)
    histories, targets = make_users(3, 60)
    with pytest.raises(DataError, match="one row per history"):
        evaluate_generator(
            HashGenerator(SIZES), table, histories, targets.take([0]),
            train_counts=np.zeros(60, np.int64), max_history=5, ks=(5,),
        )  # fmt: skip


def test_decoding_keeps_the_order_of_users_and_the_training_mode() -> None:
    class Wrapped(nn.Module):
        """Records whether it was in evaluation mode when asked."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = HashGenerator(SIZES)
            self.modes: set[bool] = set()

        def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            self.modes.add(self.training)
            return self.inner.prefill(tokens, mask)

        def step(
            self, state: Tensor, parents: Tensor, codes: Tensor, level: int
        ) -> tuple[Tensor, Tensor]:
            return self.inner.step(state, parents, codes, level)

    table = make_table(100)
    histories, _ = make_users(30, 100)
    model = Wrapped().train()
    options = {"widths": (6, 20, 20), "max_history": 20}
    batched = SidDecoder(model, table, batch_users=8, **options).decode(histories)
    assert model.training
    assert model.modes == {False}
    for user in range(30):
        alone = SidDecoder(model, table, **options).decode(histories.take([user]))
        np.testing.assert_array_equal(alone.sid_rank[0], batched.sid_rank[user])
    with evaluation_mode(HashGenerator(SIZES)):
        pass
