from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from forge_ray.sweep.correlation import correlate, kendall, spearman


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
