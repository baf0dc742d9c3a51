"""Poisson bootstrap: mergeable, paired, and as wide as theory says."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.evaluate.bootstrap import Replicates, interval, poisson_weights

USERS = np.arange(3000, dtype=np.int64)


def test_weights_are_poisson_and_depend_on_user_replicate_and_seed_only() -> None:
    weights = poisson_weights(USERS, 200, seed=0)
    shares = np.bincount(weights.astype(int).ravel(), minlength=5)[:4] / weights.size
    assert shares == pytest.approx([0.3679, 0.3679, 0.1839, 0.0613], abs=2e-3)
    # Neither users nor replicates are copies of each other.
    assert abs(np.corrcoef(weights[0], weights[1])[0, 1]) < 0.3
    assert abs(np.corrcoef(weights[:, 0], weights[:, 1])[0, 1]) < 0.1
    part = poisson_weights(USERS[500:600], 200, seed=0)
    np.testing.assert_array_equal(part, weights[500:600])
    np.testing.assert_array_equal(poisson_weights(USERS, 50, seed=0), weights[:, :50])
    assert (poisson_weights(USERS, 200, seed=1) != weights).mean() > 0.5


def test_parts_add_up_to_the_whole() -> None:
    values = {"a": np.random.default_rng(0).random(3000), "b": np.arange(3000.0)}
    whole, parts = Replicates(40), Replicates(40)
    whole.add(USERS, values)
    for rows in np.array_split(USERS, 4):
        one = Replicates(40)
        one.add(rows, {name: column[rows] for name, column in values.items()})
        parts.merge(one)
    parts.merge(Replicates(40))
    assert parts.names == whole.names == ("a", "b")
    assert parts.means() == pytest.approx(whole.means())


def test_intervals_are_as_wide_as_the_standard_error_says() -> None:
    values = np.random.default_rng(1).random(3000)
    found = Replicates(1000)
    found.add(USERS, {"a": values})
    bounds = interval(found.means()[0])
    error = values.std() / np.sqrt(3000)
    assert bounds.low < values.mean() < bounds.high
    assert bounds.high - bounds.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_differences_of_paired_rankers_are_sharper_than_their_intervals() -> None:
    rng = np.random.default_rng(2)
    base = rng.random(3000)
    better = base + 0.01 + 0.01 * rng.random(3000)
    one, other = Replicates(500), Replicates(500)
    one.add(USERS, {"a": better})
    other.add(USERS, {"a": base})
    bounds = interval(one.means()[0] - other.means()[0])
    assert 0.01 < bounds.low < bounds.high < 0.02
    wide = interval(one.means()[0])
    assert bounds.high - bounds.low < 0.1 * (wide.high - wide.low)


def test_replicates_without_users_say_nothing() -> None:
    assert np.isnan(interval(np.full(5, np.nan)).low)
    assert Replicates(5).means().shape == (0, 5)
