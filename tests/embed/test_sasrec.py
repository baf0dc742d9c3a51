"""SASRec: causal, exact cross-entropy, learns a rule, repeats, never scores by what comes later."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from forge_ray.data.ragged import Ragged
from forge_ray.embed import sasrec
from forge_ray.embed.sasrec import (
    SasRec,
    SasRecConfig,
    cross_entropy,
    fit_sasrec,
    mean_reciprocal_rank,
)
from forge_ray.errors import ConfigError, TrainingError

SMALL = SasRecConfig(dim=16, layers=1, max_length=8, epochs=20, batch_users=16, dropout=0.1)


def cycles(num_users: int = 60, num_items: int = 12, seed: int = 0) -> Ragged:
    """Every user walks the items in order, from a random place on, for 3 to 12 steps."""
    rng = np.random.default_rng(seed)
    rows = [
        (np.arange(rng.integers(3, 13)) + rng.integers(num_items)) % num_items
        for _ in range(num_users)
    ]
    return Ragged.from_lists(rows, dtype=np.int32)


def model(config: SasRecConfig = SMALL, num_items: int = 12) -> SasRec:
    torch.manual_seed(0)
    return SasRec(num_items, config).eval()


def test_a_place_sees_neither_later_items_nor_filling() -> None:
    net = model()
    short = net(torch.tensor([[3, 5, 7]]))
    long = net(torch.tensor([[3, 5, 7, 1, 2], [9, -1, -1, -1, -1]]))
    torch.testing.assert_close(short[0], long[0, :3])
    alone = net(torch.tensor([[9]]))
    torch.testing.assert_close(alone[0, 0], long[1, 0])


def test_scores_do_not_depend_on_the_block() -> None:
    net, histories = model(), cycles(9)
    whole = net.score_all_items(histories)
    assert whole.shape == (9, 12)
    for row in range(9):
        np.testing.assert_allclose(
            whole[row], net.score_all_items(histories.take([row]))[0], atol=1e-5
        )


def test_only_the_newest_items_are_read() -> None:
    net = model()
    long = Ragged.from_lists([np.arange(12)], dtype=np.int32)
    np.testing.assert_array_equal(net.user_vectors(long), net.user_vectors(long.tail(8)))


def test_a_user_without_history_has_no_vector() -> None:
    rows = Ragged.from_lists([[], [1, 2], []], dtype=np.int32)
    vectors = model().user_vectors(rows)
    assert vectors.any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("at_once", [2**20, 30])
def test_the_loss_is_that_of_a_plain_loop(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasrec, "SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(sasrec, "_LEAST_ROWS", 1)
    rng = np.random.default_rng(0)
    hidden, items = rng.normal(size=(7, 4)), rng.normal(size=(10, 4))
    targets = rng.integers(0, 10, size=7)
    expected = 0.0
    for row, target in zip(hidden, targets, strict=True):
        scores = [float(row @ item) for item in items]
        expected -= scores[target] - np.log(sum(np.exp(score) for score in scores))
    table = torch.from_numpy(items).requires_grad_()
    loss = cross_entropy(torch.from_numpy(hidden), table, torch.from_numpy(targets))
    loss.backward()
    assert loss.item() == pytest.approx(expected / 7, rel=1e-12)
    share = torch.softmax(torch.from_numpy(hidden @ items.T), dim=1).numpy()
    share[np.arange(7), targets] -= 1
    np.testing.assert_allclose(table.grad.numpy(), share.T @ hidden / 7, atol=1e-12)
    rows = torch.from_numpy(hidden).requires_grad_()
    (3 * cross_entropy(rows, table, torch.from_numpy(targets))).backward()
    np.testing.assert_allclose(rows.grad.numpy(), 3 * share @ items / 7, atol=1e-12)


def test_drawn_negatives_stand_for_all_items() -> None:
    rng = np.random.default_rng(0)
    hidden = torch.from_numpy(rng.normal(size=(5, 4)))
    items = torch.from_numpy(rng.normal(size=(10, 4)))
    targets = torch.from_numpy(rng.integers(0, 10, size=5))
    full = cross_entropy(hidden, items, targets)
    everything = cross_entropy(hidden, items, targets, negatives=torch.arange(10))
    torch.testing.assert_close(everything, full)
    # The denominator is unbiased: over all draws of three items its mean is that of all items.
    draws = torch.combinations(torch.arange(10), 3)
    one = torch.exp(hidden @ items.T)
    positive = one.gather(1, targets[:, None])[:, 0]
    totals = []
    for draw in draws:
        loss = cross_entropy(hidden[:1], items, targets[:1], negatives=draw)
        totals.append(torch.exp(loss) * positive[0])
    torch.testing.assert_close(torch.stack(totals).mean(), one[0].sum())


def test_it_learns_who_follows_whom() -> None:
    net = fit_sasrec(SMALL, cycles(), 12)
    fresh = cycles(30, seed=1)
    assert mean_reciprocal_rank(net, fresh) > 0.9
    assert mean_reciprocal_rank(model(), fresh) < 0.5
    history = Ragged.from_lists([[2, 3, 4]], dtype=np.int32)
    assert net.score_all_items(history)[0].argmax() == 5


def test_reciprocal_ranks_equal_a_plain_loop() -> None:
    net, histories = model(), cycles(10)
    found = []
    for row in histories:
        recent = row[-9:]
        for place in range(1, len(recent)):
            one = Ragged.from_lists([recent[:place]], dtype=np.int32)
            scores = net.score_all_items(one)[0]
            found.append(1 / (scores >= scores[recent[place]]).sum())
    assert mean_reciprocal_rank(net, histories) == pytest.approx(np.mean(found), rel=1e-5)


def test_training_repeats_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = fit_sasrec(SMALL, cycles(), 12).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    second = fit_sasrec(SMALL, cycles(), 12).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_epoch_is_kept_and_patience_ends_training() -> None:
    # With this rate the ranking of the users set aside soon stops rising.
    config = dataclasses.replace(SMALL, learning_rate=0.1, epochs=60, holdout_share=0.3, patience=3)
    figures: list[float] = []
    kept = fit_sasrec(config, cycles(), 12, report=lambda _, row: figures.append(row["mrr"]))
    assert len(figures) < 60
    assert len(figures) == int(np.argmax(figures)) + 1 + 3
    order = np.random.default_rng(config.seed).permutation(60)
    assert mean_reciprocal_rank(kept, cycles().take(order[:18])) == pytest.approx(max(figures))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 8),
        ("layers", 2),
        ("heads", 4),
        ("dropout", 0.5),
        ("max_length", 3),
        ("epochs", 1),
        ("patience", 1),
        ("holdout_share", 0.0),
        ("batch_users", 7),
        ("learning_rate", 1e-2),
        ("weight_decay", 0.1),
        ("negatives", 4),
        ("seed", 1),
    ],
)
def test_every_field_changes_the_scores(field: str, value: float) -> None:
    base = dataclasses.replace(SMALL, learning_rate=0.1, epochs=12, patience=4, holdout_share=0.2)
    histories = cycles(20, seed=2)
    one = fit_sasrec(base, histories, 12).score_all_items(histories)
    other = fit_sasrec(dataclasses.replace(base, **{field: value}), histories, 12)
    assert not np.array_equal(one, other.score_all_items(histories))


def test_bad_fields_and_histories_are_named() -> None:
    with pytest.raises(ConfigError, match=r"sasrec\.heads must divide sasrec\.dim, got 3 and 16"):
        dataclasses.replace(SMALL, heads=3)
    with pytest.raises(ConfigError, match=r"sasrec\.dropout must be in \[0, 1\), got 1"):
        dataclasses.replace(SMALL, dropout=1.0)
    lonely = Ragged.from_lists([[1], [2]], dtype=np.int32)
    with pytest.raises(TrainingError, match="histories of two items"):
        fit_sasrec(SMALL, lonely, 12)
