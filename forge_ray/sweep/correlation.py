"""Rank correlations, their bootstrap over trials and their chance, as matrix products. Pure numpy.

A resample is a row of counts: how often each trial was drawn. Ranks, ties and concordant pairs
inside a resample are then sums over counts, so a thousand resamples are a few products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 1000
COVERAGE = 0.9
"""Of the intervals, two-sided."""
NUM_SHUFFLES = 9999
"""Of the permutation test: no p-value is below one in ten thousand."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A rank correlation with its percentile bootstrap interval; NaN where undefined.

    Attributes:
        value: In [-1, 1].
        low: 5 % quantile over resampled trials.
        high: 95 % quantile.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


UNDEFINED = Interval(value=math.nan, low=math.nan, high=math.nan)


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Spearman's rho and Kendall's tau-b of two columns."""

    spearman: Interval
    kendall: Interval


def correlate(first: Floats, second: Floats, *, seed: int = 0) -> RankCorrelation:
    """Both rank correlations with intervals.

    Args:
        first: (n,) float64.
        second: (n,) float64.
        seed: Of the resamples.

    Source: Efron & Tibshirani 1993, chapter 13 (percentile interval).
    """
    num = len(first)
    if num < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return RankCorrelation(spearman=UNDEFINED, kendall=UNDEFINED)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)
    counts = np.vstack([np.ones(num), drawn])
    return RankCorrelation(
        spearman=_interval(spearman(first, second, counts)),
        kendall=_interval(kendall(first, second, counts)),
    )


def spearman(first: Floats, second: Floats, counts: Floats) -> Floats:
    """Spearman's rho of each resample.

    Args:
        first: (n,) float64.
        second: (n,) float64.
        counts: (b, n) float64, how often each trial was drawn.

    Returns:
        (b,) float64; NaN where a side is constant.
    """
    x, y = (_centred(_ranks(one, counts), counts) for one in (first, second))
    spread = (counts * x**2).sum(1) * (counts * y**2).sum(1)
    return _ratio((counts * x * y).sum(1), np.sqrt(spread))


def kendall(first: Floats, second: Floats, counts: Floats) -> Floats:
    """Kendall's tau-b of each resample; arguments and result as in `spearman`."""
    x, y = (np.sign(one[:, None] - one[None, :]) for one in (first, second))
    together, in_x, in_y = (((counts @ one) * counts).sum(1) for one in (x * y, x**2, y**2))
    return _ratio(together, np.sqrt(in_x * in_y))


@dataclass(frozen=True, kw_only=True)
class Tails:
    """One-sided p-values of rank correlations.

    Attributes:
        above: (p,) float64, that chance alone correlates at least as much.
        below: (p,) float64, that it correlates at most as much.
    """

    above: Floats
    below: Floats


def permutation_tails(columns: Floats, values: Floats, *, seed: int = 0) -> Tails:
    """How often shuffled values correlate as much with each column, by Spearman's rho.

    Exact at any number of trials, with ties, and whatever the columns have to do with each other;
    the normal and the t approximation err by several times in the tails of few trials.

    Args:
        columns: (n, p) float64.
        values: (n,) float64.
        seed: Of the shuffles.

    Source: Phipson & Smyth 2010 (the observed order counts as one of the shuffles).
    """
    once = np.ones((1, len(values)))
    # Their covariance is enough: shuffling changes no spread.
    ranks = np.column_stack([_centred(_ranks(one, once), once)[0] for one in columns.T])
    target = _centred(_ranks(values, once), once)[0]
    rows = np.tile(target, (NUM_SHUFFLES, 1))
    drawn = np.random.default_rng(seed).permuted(rows, axis=1) @ ranks
    seen = target @ ranks
    return Tails(
        above=(1 + (drawn >= seen - 1e-9).sum(axis=0)) / (NUM_SHUFFLES + 1),
        below=(1 + (drawn <= seen + 1e-9).sum(axis=0)) / (NUM_SHUFFLES + 1),
    )


def holm(p_values: Floats) -> Floats:
    """P-values corrected for how many there are.

    Those at most α hold a false one with probability at most α, however they depend.

    Args:
        p_values: (p,) float64, in [0, 1].

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values, kind="stable")
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected


def _ranks(values: Floats, counts: Floats) -> Floats:
    below = (values[:, None] < values[None, :]) + 0.5 * (values[:, None] == values[None, :])
    return np.asarray(counts @ below)


def _centred(ranks: Floats, counts: Floats) -> Floats:
    return np.asarray(ranks - (counts * ranks).sum(1, keepdims=True) / counts.sum(1, keepdims=True))


def _ratio(above: Floats, below: Floats) -> Floats:
    is_defined = below > 1e-9
    return np.where(is_defined, above / np.where(is_defined, below, 1.0), np.nan)


def _interval(found: Floats) -> Interval:
    """From the value itself, first, and those of the resamples."""
    tail = (1 - COVERAGE) / 2
    low, high = np.nanquantile(found[1:], [tail, 1 - tail])
    return Interval(value=float(found[0]), low=float(low), high=float(high))
