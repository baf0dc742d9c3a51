"""The prefix-backoff probe against its dense definition, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.ragged import Ragged
from forge_ray.sid.metrics.backoff import (
    ProbeData,
    backoff_bits,
    count_transitions,
    fit_mixture,
    fit_model,
    merge_transitions,
    probe_rows,
    random_codes,
    shuffled_codes,
)

NUM_ITEMS = 12


def draw(seed: int, *, levels: int = 3) -> tuple[np.ndarray, Ragged, Ragged, Ragged]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, size=(NUM_ITEMS, levels))
    train = Ragged.from_lists([rng.integers(0, NUM_ITEMS, size=n) for n in rng.integers(0, 9, 15)])
    targets = Ragged.from_lists(
        [rng.integers(0, NUM_ITEMS, size=n) for n in rng.integers(1, 3, 15)]
    )
    return codes, train, train, targets


def probe(train: Ragged, histories: Ragged, targets: Ragged) -> ProbeData:
    rows = probe_rows(histories, targets)
    counts = np.bincount(train.values, minlength=NUM_ITEMS)
    return ProbeData(count_transitions(train, NUM_ITEMS), counts, rows, rows)


def dense_distribution(codes: np.ndarray, train: Ragged, history: np.ndarray) -> np.ndarray:
    """Columns f_0..f_L of every item of the catalogue for one history: the definition, densely."""
    pop = np.bincount(train.values, minlength=NUM_ITEMS)
    q0 = (pop + 0.5) / (pop + 0.5).sum()
    same = (codes[:, None] == codes[None]).all(axis=2)
    q = (same * q0).sum(axis=1) / same.sum(axis=1)
    moves = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for row in train:
        for at, item in enumerate(row):
            for distance in (1, 2, 3):
                if at + distance < len(row):
                    moves[item, row[at + distance]] += 0.6 ** (distance - 1)
    weight = np.zeros(NUM_ITEMS)
    for age, item in enumerate(history[::-1][:5]):
        weight[item] += 0.6**age
    weight /= max(weight.sum(), 1e-300)
    columns = [q]
    for depth in range(1, codes.shape[1] + 1):
        _, ids = np.unique(codes[:, :depth], axis=0, return_inverse=True)
        onehot = np.eye(ids.max() + 1)[ids.ravel()]
        table = onehot.T @ moves @ onehot
        table /= np.maximum(table.sum(axis=1, keepdims=True), 1e-300)
        follow = (weight @ onehot @ table)[ids.ravel()]
        columns.append(follow * q / (onehot @ (onehot.T @ q)))
    return np.stack(columns, axis=1)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_factors_equal_the_dense_definition(seed: int) -> None:
    codes, train, histories, targets = draw(seed)
    data = probe(train, histories, targets)
    found = fit_model(codes, data.transitions, data.train_counts).factors(data.score)
    users = targets.row_ids
    for row, (user, target) in enumerate(zip(users, targets.values, strict=True)):
        dense = dense_distribution(codes, train, histories.row(int(user)))
        assert found[row] == pytest.approx(dense[target])
        assert np.all(dense.sum(axis=0) <= 1 + 1e-9)


def test_one_level_of_unique_codes_is_an_item_level_markov_model() -> None:
    _, train, histories, targets = draw(1)
    data = probe(train, histories, targets)
    codes = np.arange(NUM_ITEMS)[:, None]
    moves = np.zeros((NUM_ITEMS, NUM_ITEMS))
    transitions = data.transitions
    moves[transitions.source, transitions.target] = transitions.weight
    moves /= np.maximum(moves.sum(axis=1, keepdims=True), 1e-300)
    found = fit_model(codes, transitions, data.train_counts).factors(data.score)[:, 1]
    want = (data.score.weights * moves[data.score.items, data.score.target[:, None]]).sum(axis=1)
    assert found == pytest.approx(want)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_bits_do_not_depend_on_the_names_of_codes(seed: int) -> None:
    codes, train, histories, targets = draw(seed)
    data = probe(train, histories, targets)
    rng = np.random.default_rng(seed)
    renamed = np.stack([rng.permutation(3)[column] for column in codes.T], axis=1)
    assert backoff_bits(renamed, data).bits == pytest.approx(backoff_bits(codes, data).bits)


def test_mixture_is_a_distribution_that_em_only_improves() -> None:
    codes, train, histories, targets = draw(4)
    data = probe(train, histories, targets)
    factors = fit_model(codes, data.transitions, data.train_counts).factors(data.fit)
    weight = data.fit.row_weight
    likelihood = []
    for steps in (0, 1, 5, 60):
        mixture = fit_mixture(factors, weight, steps=steps)
        assert mixture.sum() == pytest.approx(1.0)
        assert mixture.min() >= 0
        likelihood.append((weight * np.log(factors @ mixture)).sum())
    assert np.all(np.diff(likelihood) >= -1e-12)


def test_repeating_users_leaves_everything_finite_and_equal() -> None:
    codes, train, histories, targets = draw(5)
    once = probe_rows(histories, targets)
    twice = probe_rows(Ragged.concatenate([histories] * 2), Ragged.concatenate([targets] * 2))
    data = probe(train, histories, targets)
    doubled = ProbeData(data.transitions, data.train_counts, twice, twice)
    single = ProbeData(data.transitions, data.train_counts, once, once)
    assert backoff_bits(codes, doubled).bits == pytest.approx(backoff_bits(codes, single).bits)
    assert np.isfinite(backoff_bits(codes, doubled).mixture).all()


def test_users_with_several_targets_count_once() -> None:
    codes, train, *_ = draw(6)
    histories = Ragged.from_lists([[1, 2], [3]])
    data = probe(train, histories, Ragged.from_lists([[4, 5], [6]]))
    found = backoff_bits(codes, data)
    first, second, third = found.per_target
    assert found.bits == pytest.approx(((first + second) / 2 + third) / 2)


def test_transitions_add_over_blocks_of_users() -> None:
    _, train, *_ = draw(7)
    parts = [count_transitions(train.take(rows), NUM_ITEMS) for rows in ([0, 1, 2], range(3, 15))]
    whole, merged = count_transitions(train, NUM_ITEMS), merge_transitions(parts, NUM_ITEMS)
    assert np.array_equal(whole.source, merged.source)
    assert np.array_equal(whole.target, merged.target)
    assert whole.weight == pytest.approx(merged.weight)


def test_no_train_sequence_and_no_scored_user_are_defined() -> None:
    codes, _, histories, targets = draw(8)
    data = probe(Ragged.from_lists([]), histories, targets)
    assert np.isfinite(backoff_bits(codes, data).bits)
    empty = data.score.take(np.zeros(0, int))
    found = backoff_bits(codes, ProbeData(data.transitions, data.train_counts, data.fit, empty))
    assert np.isnan(found.bits)


def planted(num_items: int = 4000) -> tuple[np.ndarray, ProbeData]:
    """Users stay inside one of eight topics; the first code is the topic."""
    rng = np.random.default_rng(0)
    topic = np.arange(num_items) % 8
    codes = np.stack(
        [topic, rng.integers(0, 16, num_items), rng.integers(0, 16, num_items)], axis=1
    )
    user_topic = rng.integers(0, 8, size=(1500, 1))
    items = rng.integers(0, num_items // 8, size=(1500, 7)) * 8 + user_topic
    train = Ragged.from_lists(items[:, :6])
    held_out = probe_rows(train, Ragged.from_lists(items[:, 6:]))
    counts = np.bincount(train.values, minlength=num_items)
    return codes, ProbeData(
        count_transitions(train, num_items),
        counts,
        held_out.take(np.arange(0, 1500, 2)),
        held_out.take(np.arange(1, 1500, 2)),
    )


def test_meaning_is_gained_and_shuffling_is_random() -> None:
    codes, data = planted()
    own = backoff_bits(codes, data).bits
    shuffled = backoff_bits(shuffled_codes(codes), data).bits
    drawn = backoff_bits(random_codes(codes, [8, 16, 16]), data).bits
    assert own == pytest.approx(np.log2(500), abs=0.2)  # 500 items a topic
    assert shuffled - own > 1.5
    assert shuffled == pytest.approx(drawn, abs=0.1)


def test_controls_keep_the_bucket_sizes() -> None:
    codes, _ = planted()
    sizes = sorted(np.unique(codes, axis=0, return_counts=True)[1])
    for control in (shuffled_codes(codes, seed=3), random_codes(codes, [8, 16, 16], seed=3)):
        assert control.shape == codes.shape
        assert sorted(np.unique(control, axis=0, return_counts=True)[1]) == sizes
        assert not np.array_equal(control, codes)
    full = np.array(list(np.ndindex(2, 2)))
    assert len(np.unique(random_codes(full, [2, 2]), axis=0)) == 4
