"""The conformal test against explicit refits, and its promise in worlds whose truth is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from forge_ray.sweep.calibration import (
    SINGLE_BELOW,
    Trained,
    assess,
    controls_needed,
    deleted_residuals,
    held_out_correlation,
    held_out_scores,
    held_out_spearman,
    normal_scores,
    p_value_at,
    ridge_support,
)

STRENGTHS = (0.9, 0.5, 0.0, 0.0)


def world(
    rng: np.random.Generator, num: int, strengths: tuple[float, ...] = STRENGTHS
) -> tuple[np.ndarray, np.ndarray]:
    """Proxies with these correlations to the quality, and the quality; jointly normal."""
    quality = rng.normal(size=num)
    noise = rng.normal(size=(num, len(strengths)))
    weight = np.array(strengths)
    return weight * quality[:, None] + np.sqrt(1 - weight**2) * noise, quality


def trained(proxies: np.ndarray, values: np.ndarray, controls: int | None = None) -> Trained:
    is_control = np.arange(len(values)) < (len(values) if controls is None else controls)
    return Trained(
        proxies=proxies, values=values, errors=np.full(len(values), 0.05), is_control=is_control
    )


@pytest.mark.parametrize("shape", [(1,), (13,), (13, 3)])
def test_normal_scores(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 6, size=shape).astype(float)
    expected = stats.rankdata(values, axis=0)
    np.testing.assert_allclose(normal_scores(values), stats.norm.ppf(expected / (len(values) + 1)))


def test_correlation_without_a_trial_equals_a_loop() -> None:
    rng = np.random.default_rng(1)
    x, y = stats.rankdata(rng.normal(size=(12, 3)), axis=0), stats.rankdata(rng.normal(size=12))
    x[:, 2] = 4.0
    found = held_out_spearman(x, y)
    for trial in range(12):
        kept = np.arange(12) != trial
        for column in range(2):
            expected = np.corrcoef(x[kept, column], y[kept])[0, 1]
            assert found[trial, column] == pytest.approx(expected)
    assert (found[:, 2] == -1).all()


def test_few_trials_follow_the_best_proxy_of_the_others() -> None:
    x, y = world(np.random.default_rng(2), SINGLE_BELOW - 1)
    score = held_out_scores(normal_scores(x), normal_scores(y))
    ranked = stats.rankdata(x, axis=0)
    for trial in range(len(y)):
        kept = np.arange(len(y)) != trial
        correlations = [
            np.corrcoef(ranked[kept, column], stats.rankdata(y)[kept])[0, 1] for column in range(4)
        ]
        assert score[trial] == normal_scores(x)[trial, int(np.argmax(correlations))]


@pytest.mark.parametrize("num", [SINGLE_BELOW, 60])
def test_ridge_without_a_trial_equals_a_refit(num: int) -> None:
    x, y = world(np.random.default_rng(3), num, (0.8, 0.6, 0.3, -0.7))
    z, t = normal_scores(x), normal_scores(y)
    used = ridge_support(z, t)
    assert used.tolist()[0]
    # The registry says that more is better: what points the other way gets no weight.
    assert not used.tolist()[3]
    score = held_out_scores(z, t)
    for trial in range(num):
        kept = np.arange(num) != trial
        a = z[kept][:, used]
        weights = np.linalg.solve(a.T @ a + 4 * np.eye(used.sum()), a.T @ t[kept])
        assert score[trial] == pytest.approx(float(z[trial, used] @ weights))


def test_the_support_is_the_best_of_all_supports() -> None:
    x, y = world(np.random.default_rng(4), 40, (0.6, 0.4, -0.3, 0.1))
    z, t = normal_scores(x), normal_scores(y)
    losses = {}
    for bits in range(16):
        used = np.array([bool(bits >> one & 1) for one in range(4)])
        a = z[:, used]
        weights = np.linalg.solve(a.T @ a + 4 * np.eye(used.sum()), a.T @ t)
        if (weights >= 0).all():
            losses[bits] = float(((t - a @ weights) ** 2).sum() + 4 * (weights**2).sum())
    best = min(losses, key=losses.__getitem__)
    assert ridge_support(z, t).tolist() == [bool(best >> one & 1) for one in range(4)]


def test_deleted_residuals_equal_refits() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=11)
    y = 0.7 * x + rng.normal(size=11)
    found = deleted_residuals(x, y)
    assert found is not None
    for point in range(11):
        kept = np.arange(11) != point
        line = np.polyfit(x[kept], y[kept], 1)
        assert found[point] == pytest.approx(y[point] - np.polyval(line, x[point]))


def test_a_line_without_a_base_says_nothing() -> None:
    x = np.arange(5.0)
    assert deleted_residuals(np.zeros(5), x) is None
    assert deleted_residuals(np.array([0, 0, 0, 0, 1.0]), x) is None


def test_p_value_counts_controls_as_poor_for_their_quality() -> None:
    """One proxy, spelled out: the line without each trial, and who lies as far below it."""
    x, y = world(np.random.default_rng(6), 12, (0.8,))
    new, value = np.array([-0.4]), 1.0
    s, t = normal_scores(np.append(x[:, 0], new)), normal_scores(np.append(y, value))
    residuals = []
    for trial in range(13):
        kept = np.arange(13) != trial
        residuals.append(s[trial] - np.polyval(np.polyfit(t[kept], s[kept], 1), t[trial]))
    expected = sum(one <= residuals[-1] for one in residuals) / 13
    assert p_value_at(trained(x, y), new, value) == pytest.approx(expected)
    # Only controls are counted, though all 12 may shape the score.
    few = p_value_at(trained(x, y, controls=4), new, value)
    assert few in {one / 5 for one in range(1, 6)}


def test_nothing_is_tested_before_the_p_value_can_be_as_small_as_the_risk() -> None:
    assert [controls_needed(risk) for risk in (0.5, 0.25, 0.2, 0.1, 0.05, 0.3)] == [
        1, 3, 4, 9, 19, 3,
    ]  # fmt: skip
    x, y = world(np.random.default_rng(7), 30, (0.99,))
    poor = np.array([-9.0])
    assert assess(trained(x[:8], y[:8]), poor, risk=0.1).state == "few"
    assert assess(trained(x, y, controls=8), poor, risk=0.1).state == "few"
    tested = assess(trained(x[:9], y[:9]), poor, risk=0.1)
    assert (tested.state, tested.p_value) == ("tested", pytest.approx(0.1))
    assert tested.lower_bound == pytest.approx(y[:9].max() - 0.05)


def test_a_design_is_not_too_poor_to_be_pruned() -> None:
    """One far point tilts the line of a small bag, and must not hide itself by that."""
    trials = trained(np.arange(4.0)[:, None], np.arange(4.0))
    p_values = [p_value_at(trials, np.array([one]), 2.95) for one in (-1.0, 0.5, 1.5, 2.5, 3.5)]
    assert p_values[0] == pytest.approx(0.2)
    assert p_values == sorted(p_values)


def test_a_proxy_that_ranks_nothing_is_no_evidence() -> None:
    x, y = world(np.random.default_rng(8), 15, (0.0,))
    for proxies in (x, np.ones_like(x), x[:, :0], -y[:, None]):
        found = assess(trained(proxies, y), np.full(proxies.shape[1], -9.0), risk=0.1)
        assert (found.state, found.p_value) == ("no evidence", 1.0)
    assert math.isnan(held_out_correlation(x, np.ones(15)))


@pytest.mark.parametrize("num", [10, 25])
def test_answers_depend_on_ranks_only(num: int) -> None:
    x, y = world(np.random.default_rng(9), num + 1)
    trials, new = trained(x[:num], y[:num]), x[num]
    first = p_value_at(trials, new, 0.8)
    order = np.random.default_rng(0).permutation(num)
    shuffled = trained(x[order], y[order])
    assert p_value_at(shuffled, new, 0.8) == first
    bent = dataclasses.replace(trials, proxies=np.exp(x[:num]), values=y[:num] ** 3)
    assert p_value_at(bent, np.exp(new), 0.8**3) == first


@pytest.mark.parametrize("strengths", [(0.9, 0.5, 0.0), (0.0, 0.0, 0.0), (0.6, 0.6, 0.6)])
@pytest.mark.parametrize("num", [9, 29])
def test_the_true_value_is_rejected_no_more_often_than_the_risk(
    strengths: tuple[float, ...], num: int
) -> None:
    """The finite-sample guarantee, selection of proxies and weights included."""
    rng = np.random.default_rng(10)
    worlds = [world(rng, num + 1, strengths) for _ in range(600)]
    rejected = [p_value_at(trained(x[:num], y[:num]), x[num], y[num]) <= 0.1 for x, y in worlds]
    assert np.mean(rejected) <= 0.1 + 2.6 * math.sqrt(0.09 / 600)


@pytest.mark.parametrize("strengths", [(0.9, 0.5, 0.0), (0.7, 0.0, 0.0)])
def test_the_best_design_is_rejected_no_more_often_than_the_risk(
    strengths: tuple[float, ...],
) -> None:
    """The new design is the best one in every world: selected, and still covered."""
    rng = np.random.default_rng(11)
    rejected, others = [], []
    for _ in range(600):
        x, y = world(rng, 20, strengths)
        order = np.argsort(y)
        x, y = x[order], y[order]
        trials = trained(x[:19], y[:19])
        rejected.append(assess(trials, x[19], risk=0.1).p_value <= 0.1)
        worse = trained(np.delete(x, 5, axis=0), np.delete(y, 5))
        others.append(assess(worse, x[5], risk=0.1).p_value <= 0.1)
    assert np.mean(rejected) <= 0.1 + 2.6 * math.sqrt(0.09 / 600)
    # A design of the lower third is stopped, as far as the proxy can tell.
    assert np.mean(others) > (0.5 if max(strengths) == 0.9 else 0.2)


def test_the_bound_of_what_is_pruned_lies_below_the_incumbents() -> None:
    """Turned round by brute force: whatever at or above the lower bound is tried, is rejected."""
    rng = np.random.default_rng(12)
    pruned = agreed = 0
    for _ in range(150):
        x, y = world(rng, 16, (0.9, 0.3))
        trials = trained(x[:15], y[:15])
        found = assess(trials, x[15], risk=0.1)
        if found.state == "tested" and found.p_value <= 0.1:
            pruned += 1
            better = [found.lower_bound, *y[:15][y[:15] > found.lower_bound], 99.0]
            agreed += max(p_value_at(trials, x[15], one) for one in better) <= 0.1
    assert pruned > 30
    assert agreed / pruned > 0.95
