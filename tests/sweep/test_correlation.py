from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from forge_ray.sweep.correlation import correlate, holm, kendall, permutation_tails, spearman


@pytest.mark.parametrize("num_values", [4, 100])
def test_resamples_equal_scipy_on_the_drawn_trials(num_values: int) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, num_values, size=15).astype(float)
    second = first + rng.integers(0, num_values, size=15)
    counts = rng.multinomial(15, np.full(15, 1 / 15), size=20).astype(float)
    rho, tau = spearman(first, second, counts), kendall(first, second, counts)
    for row, drawn in enumerate(counts):
        x, y = (np.repeat(one, drawn.astype(int)) for one in (first, second))
        assert rho[row] == pytest.approx(stats.spearmanr(x, y).statistic)
        assert tau[row] == pytest.approx(stats.kendalltau(x, y).statistic)


def test_a_constant_resample_is_undefined() -> None:
    counts = np.array([[4.0, 0.0, 0.0, 0.0]])
    values = np.arange(4.0)
    assert math.isnan(spearman(values, values, counts)[0])
    assert math.isnan(kendall(values, values, counts)[0])
    assert math.isnan(correlate(values, np.ones(4)).spearman.value)
    assert math.isnan(correlate(values[:2], values[:2]).kendall.low)


def test_intervals_cover_the_truth() -> None:
    """Jointly normal columns: rho = 6 / pi * asin(r / 2), tau = 2 / pi * asin(r)."""
    r, covered = 0.6, np.zeros(2)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=40)
        found = correlate(x, r * x + math.sqrt(1 - r * r) * rng.normal(size=40), seed=seed)
        truths = 6 / math.pi * math.asin(r / 2), 2 / math.pi * math.asin(r)
        for place, one in enumerate((found.spearman, found.kendall)):
            assert one.low < one.value < one.high
            covered[place] += one.low <= truths[place] <= one.high
    assert (covered >= 80).all()
    assert (covered <= 98).all()
    assert correlate(x, x) == correlate(x, x)
    assert str(correlate(x, x).spearman) == "+1.00 [+1.00, +1.00]"


def test_tails_are_those_of_all_orders() -> None:
    """Against every one of the 720 orders of six values, ties included."""
    x = np.array([[1.0, 2, 2, 4, 5, 6], [6.0, 1, 2, 3, 4, 5]]).T
    y = np.array([1.0, 3, 2, 4, 4, 6])
    found = permutation_tails(x, y)
    for column, above, below in zip(x.T, found.above, found.below, strict=True):
        rho = stats.spearmanr(column, y).statistic
        orders = [
            stats.spearmanr(column, np.array(one)).statistic for one in itertools.permutations(y)
        ]
        assert above == pytest.approx(np.mean(np.array(orders) >= rho - 1e-9), abs=0.015)
        assert below == pytest.approx(np.mean(np.array(orders) <= rho + 1e-9), abs=0.015)


def test_holm_multiplies_by_the_hypotheses_that_are_left() -> None:
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.9, 0.6])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([])).shape == (0,)


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_useless_proxies_are_called_useful_no_more_often_than_stated(shared: float) -> None:
    """26 proxies of noise, alike or not: in at most one of twenty sweeps is any of them believed.

    Uncorrected it is half of the sweeps and more.
    """
    rng = np.random.default_rng(0)
    believed = np.zeros(2)
    for _ in range(100):
        common = rng.normal(size=(8, 1))
        proxies = shared * common + math.sqrt(1 - shared**2) * rng.normal(size=(8, 26))
        above = permutation_tails(proxies, rng.normal(size=8)).above
        believed += [holm(above).min() <= 0.05, above.min() <= 0.05]
    # Three standard errors above .05.
    assert believed[0] <= 11
    assert believed[1] > 25


def test_what_ranks_well_is_seen_among_many() -> None:
    rng = np.random.default_rng(0)
    quality = rng.normal(size=20)
    proxies = rng.normal(size=(20, 26))
    proxies[:, 0] = quality + 0.4 * rng.normal(size=20)
    assert holm(permutation_tails(proxies, quality).above)[0] < 0.01
    assert holm(permutation_tails(-proxies, quality).below)[0] < 0.01
