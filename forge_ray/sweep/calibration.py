"""Whether a design can still be as good as the best one, judged on proxies: a conformal test.

A rank model learns from the trained trials how proxies go with the final metric. A new design is
then put to the hypothesis "its final value equals the incumbent's lower bound": how many
control trials have proxies as poor *for their quality* as this design would have for that one? The
share of them, itself included, is the p-value; only designs with `p <= risk` may be pruned. Turned
round: the largest value with `p > risk` is the one-sided conformal upper bound of the design, and
the design is pruned when that bound lies below the incumbent's lower bound.

The residual is taken of the score given the quality, not of the quality given the score. The best
design of a sweep is chosen by its quality: residuals of the usual direction are selected along with
it (the best one is the one with the lucky residual, and a bound that holds for a random trial
misses it most), residuals of this direction are not. A useless proxy shows the difference: the
usual bound at risk .1 falls below the best of ten trials and prunes everything from then on.

What holds:
    * With control trials and the new one exchangeable, and no other trial fitted on, `P(p <= risk)`
      is at most `risk` for the design's true value, whatever the model (full conformal prediction:
      the model is refitted with the new design, symmetric in it and the controls).
    * For the best design of the sweep the same holds where the spread of the score about its mean
      does not depend on the quality. Normal scores make that exact for a Gaussian copula. A proxy
      that works for ordinary designs and misjudges just the best ones breaks it.
    * A p-value is at least 1 / (controls + 1): nothing is pruned before `1 / risk - 1` controls.
What does not:
    * Trials that the gate itself let pass are no controls: poor ones are missing among them. They
      help to fit the score, which is the one approximation above; controls are those that passed
      without a look at their proxies. Only the random share adds to them once the gate prunes.
    * Trials that halving stopped have no final value. They enter with a bound on it (halving's own
      belief that curves do not cross, see `halving.value_bounds`): a quality that is overstated
      makes proxies look poorer for it and the test more cautious. Being chosen by quality they bias
      nothing: that leaves the score given the quality as it is. Curves that cross add noise.
    * A sampler that learns (TPE) draws later designs from elsewhere: not exchangeable.

Pure numpy and scipy; knows no trial, file or configuration.

Source: Vovk, Gammerman & Shafer 2005, "Algorithmic learning in a random world" (full conformal
prediction); Lei et al. 2018, arXiv:1604.04173; van der Waerden 1952 (normal scores). Where we
differ: one hypothesis is tested instead of a whole interval, and the score is regressed on the
quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

Floats = npt.NDArray[np.float64]

SINGLE_BELOW = 20
"""Trained trials from which several proxies are weighed; fewer follow the single best one."""

_TINY = 1e-9


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the trained trials of a sweep say.

    Attributes:
        proxies: (n, p) float64, finite, turned so that larger is better.
        values: (n,) float64, final metric, larger is better; for a trial that halving stopped the
            bound on what it could have reached. Finished trials come first.
        errors: (n,) float64, standard errors of the values, 0 where unknown.
        is_control: (n,) bool, whether the trial passed without a look at its proxies.
    """

    proxies: Floats
    values: Floats
    errors: Floats
    is_control: npt.NDArray[np.bool_]

    @property
    def lower_bound(self) -> float:
        """The incumbent's value less its standard error."""
        best = int(np.argmax(self.values))
        return float(self.values[best] - self.errors[best])


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What the calibration says of one design.

    Attributes:
        state: `few`: too few controls; `no evidence`: the proxies do not rank trained trials;
            `tested`: the p-value stands.
        num_trials: Trained trials.
        num_controls: Control trials among them.
        num_needed: Controls before anything can be pruned.
        spearman: Held-out rank correlation of the score with the metric; NaN where undefined.
        lower_bound: Of the incumbent; NaN unless tested.
        p_value: That a design at the lower bound has proxies this poor; 1 unless tested.
    """

    state: Literal["few", "no evidence", "tested"]
    num_trials: int
    num_controls: int
    num_needed: int
    spearman: float = math.nan
    lower_bound: float = math.nan
    p_value: float = 1.0


def controls_needed(risk: float) -> int:
    """Controls from which a p-value can be as small as `risk`: least n with 1 / (n + 1) <= risk."""
    return math.ceil(1 / risk - 1 - _TINY)


def assess(trained: Trained, proxies: Floats, *, risk: float) -> Assessment:
    """Tests whether a design may be as good as the incumbent.

    Args:
        trained: The trained trials.
        proxies: (p,) float64, of the new design, turned like those of the trained ones.
        risk: Share of incumbents-to-be that may be lost, in (0, 1).
    """
    num_trials, num_controls = len(trained.values), int(trained.is_control.sum())
    needed = controls_needed(risk)
    facts = {"num_trials": num_trials, "num_controls": num_controls, "num_needed": needed}
    if num_controls < needed:
        return Assessment(state="few", **facts)
    spearman = held_out_correlation(trained.proxies, trained.values)
    # Looks at the trained trials only, never at the new one.
    if not _is_shown(spearman, num_trials, risk):
        return Assessment(state="no evidence", spearman=spearman, **facts)
    bound = trained.lower_bound
    p_value = p_value_at(trained, proxies, bound)
    return Assessment(
        state="tested", spearman=spearman, lower_bound=bound, p_value=p_value, **facts
    )


def is_evidence(trained: Trained, *, risk: float) -> bool:
    """Whether the proxies rank the trained trials, at one-sided level `risk`."""
    spearman = held_out_correlation(trained.proxies, trained.values)
    return _is_shown(spearman, len(trained.values), risk)


def promise(trained: Trained, proxies: Floats) -> Floats:
    """How good designs are expected to be, on a scale of ranks.

    Args:
        trained: The trained trials, at least one.
        proxies: (m, p) float64, of the designs, turned like those of the trained ones.

    Returns:
        (m,) float64, larger is better; only comparable within one call. The model is that of
        `held_out_scores`, fitted on all trained trials.
    """
    num = len(trained.values)
    known, asked = np.split(normal_scores(np.vstack([trained.proxies, proxies])), [num])
    quality = normal_scores(trained.values)
    if num >= SINGLE_BELOW:
        return np.asarray(asked @ ridge_weights(known, quality))
    ranks, target = rankdata(known, axis=0), rankdata(quality)
    spread = np.maximum(ranks.std(axis=0), _TINY)
    agreement = ((ranks - ranks.mean(axis=0)) * (target - target.mean())[:, None]).mean(axis=0)
    return np.asarray(asked[:, int(np.argmax(agreement / spread))])


def _is_shown(spearman: float, num_trials: int, risk: float) -> bool:
    # Normal approximation of the rank correlation's null distribution: its standard deviation is
    # 1 / sqrt(n - 1). NaN compares as not shown.
    return spearman * math.sqrt(max(num_trials - 1, 0)) >= float(ndtri(1 - risk))


def p_value_at(trained: Trained, proxies: Floats, value: float) -> float:
    """How usual these proxies are for a design of this final value.

    Args:
        trained: The trained trials.
        proxies: (p,) float64, of the new design.
        value: Its hypothetical final value.

    Returns:
        In [1 / (controls + 1), 1]; 1 also where the qualities cannot carry a line.
    """
    quality = normal_scores(np.append(trained.values, value))
    score = held_out_scores(normal_scores(np.vstack([trained.proxies, proxies])), quality)
    bag = np.append(trained.is_control, True)
    residuals = deleted_residuals(quality[bag], score[bag])
    return 1.0 if residuals is None else float(np.mean(residuals <= residuals[-1]))


def held_out_correlation(proxies: Floats, values: Floats) -> float:
    """Spearman correlation of the values with scores whose model did not see the trial.

    Args:
        proxies: (n, p) float64, larger is better.
        values: (n,) float64.

    Returns:
        In [-1, 1]; NaN where the score or the values are constant, there is no proxy, or one trial.
    """
    if proxies.shape[1] == 0 or len(values) < 2:
        return math.nan
    score = held_out_scores(normal_scores(proxies), normal_scores(values))
    if np.ptp(score) < _TINY or np.ptp(values) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(score), rankdata(values))[0, 1])


def held_out_scores(proxies: Floats, quality: Floats) -> Floats:
    """One score per trial, from a model that was fitted without that trial.

    Args:
        proxies: (n, p) float64, normal scores.
        quality: (n,) float64, normal scores of the metric.

    Returns:
        (n,) float64. Below `SINGLE_BELOW` trials the proxy with the best Spearman correlation,
        above it a ridge combination with weights >= 0: the registry fixes every proxy's direction.
    """
    if len(quality) < SINGLE_BELOW:
        best = np.argmax(held_out_spearman(ndtr(proxies), ndtr(quality)), axis=1)
        return proxies[np.arange(len(quality)), best]
    return _held_out_ridge(proxies, quality)


def held_out_spearman(first: Floats, second: Floats) -> Floats:
    """Correlation of each column with the metric, leaving out one trial at a time.

    Args:
        first: (n, p) float64, ranks of the proxies up to scale.
        second: (n,) float64, ranks of the metric up to scale.

    Returns:
        (n, p) float64: row i without trial i, the others keep their ranks; -1 for a constant one.
    """
    y = second[:, None]
    left = len(second) - 1
    # Sums without trial i, instead of n sums over n - 1 trials.
    sum_x, sum_y = first.sum(0) - first, y.sum(0) - y
    sum_xx, sum_yy = (first**2).sum(0) - first**2, (y**2).sum(0) - y**2
    sum_xy = (first * y).sum(0) - first * y
    spread = (left * sum_xx - sum_x**2) * (left * sum_yy - sum_y**2)
    together = left * sum_xy - sum_x * sum_y
    is_defined = spread > _TINY
    return np.where(is_defined, together / np.sqrt(np.where(is_defined, spread, 1.0)), -1.0)


def _held_out_ridge(proxies: Floats, quality: Floats) -> Floats:
    used = ridge_support(proxies, quality)
    if not used.any():
        return np.zeros_like(quality)
    # Leaving one out has a closed form once it is settled which weights are zero.
    x = proxies[:, used]
    inverse = np.linalg.inv(_penalised(x, proxies.shape[1]))
    leverage = np.einsum("ij,jk,ik->i", x, inverse, x)
    fitted = x @ (inverse @ (x.T @ quality))
    return np.asarray((fitted - leverage * quality) / (1 - leverage))


def ridge_support(proxies: Floats, quality: Floats) -> npt.NDArray[np.bool_]:
    """Which proxies have a weight above zero in `ridge_weights`; (p,) bool."""
    return np.asarray(ridge_weights(proxies, quality) > 0)


def ridge_weights(proxies: Floats, quality: Floats) -> Floats:
    """The ridge fit with weights >= 0.

    Args:
        proxies: (n, p) float64, normal scores.
        quality: (n,) float64, normal scores of the metric.

    Returns:
        (p,) float64.
    """
    count = proxies.shape[1]
    # |R w - c|^2 differs from the penalised loss by a constant: p rows instead of n.
    root = np.linalg.cholesky(_penalised(proxies, count)).T
    weights, _ = nnls(root, np.linalg.solve(root.T, proxies.T @ quality))
    return np.asarray(weights)


def _penalised(x: Floats, penalty: float) -> Floats:
    # As many pseudo-observations as proxies: with few trials their weights stay near equal.
    return x.T @ x + penalty * np.eye(x.shape[1])


def deleted_residuals(quality: Floats, score: Floats) -> Floats | None:
    """Residuals of the score on the quality, each from a line fitted without its point.

    Args:
        quality: (n,) float64.
        score: (n,) float64.

    Returns:
        (n,) float64, or None where the qualities are equal or one point alone fixes the line.
    """
    x = quality - quality.mean()
    square = max(float(x @ x), _TINY)
    leverage = 1 / len(x) + x**2 / square
    if np.ptp(quality) == 0 or 1 - leverage.max() < _TINY:
        return None
    slope = float(x @ score) / square
    return np.asarray((score - score.mean() - slope * x) / (1 - leverage))


def normal_scores(values: Floats) -> Floats:
    """Values as quantiles of the normal distribution by their rank, column by column.

    Args:
        values: (n,) or (n, p) float64.
    """
    return np.asarray(ndtri(rankdata(values, axis=0) / (len(values) + 1)))
