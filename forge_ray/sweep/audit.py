"""Whether the pruning signal deserved trust: proxies against what training found, and the price.

Pure functions over trial records. The gate claims that a cheap proxy ranks designs like the metric
that costs a training; every sweep tests that claim on its own trials, those that passed and those
that were spared, and says how many there were. Designs that the gate pruned have no final value:
what is said of them is an estimate, marked as such.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from forge_ray.sid.metrics.registry import METRICS, audited
from forge_ray.sweep.calibration import deleted_residuals, normal_scores
from forge_ray.sweep.correlation import (
    Floats,
    Interval,
    RankCorrelation,
    correlate,
    holm,
    permutation_tails,
)
from forge_ray.sweep.ledger import Resource, TrialRecord
from forge_ray.sweep.limits import is_finite
from forge_ray.sweep.views import STAGES

MIN_TRIALS = 6
"""Fewer points say nothing about a rank correlation."""
LEVEL = 0.05
"""Chance that any useless proxy of a sweep is called trusted; the same for misleading."""

Verdict = Literal["trusted", "no evidence", "misleading", "too few trials"]


@dataclass(frozen=True, kw_only=True)
class ProxyAudit:
    """One proxy against the metric.

    Attributes:
        proxy: Its name.
        num_trials: Trials with both values.
        correlation: Rank correlations with the metric, the proxy turned so that + is good.
        p_value: That chance correlates as much in this direction, corrected for the number of
            proxies (Holm); NaN where there is nothing to test.
    """

    proxy: str
    num_trials: int
    correlation: RankCorrelation
    p_value: float

    @property
    def spearman(self) -> Interval:
        """Spearman's rho."""
        return self.correlation.spearman

    @property
    def verdict(self) -> Verdict:
        """What Spearman's rho allows to say, with all the other proxies looked at as well."""
        if math.isnan(self.p_value):
            return "too few trials"
        if self.p_value > LEVEL:
            return "no evidence"
        return "trusted" if self.spearman.value > 0 else "misleading"

    @property
    def line(self) -> str:
        """The verdict as a sentence."""
        if math.isnan(self.spearman.value):
            why = "constant" if self.num_trials >= MIN_TRIALS else "too few"
            return f"{self.proxy}: nothing to say ({why}, {self.num_trials} trials)"
        return (
            f"{self.proxy}: {self.verdict} (Spearman {self.spearman}, Kendall "
            f"{self.correlation.kendall}, corrected p {self.p_value:.2g}, {self.num_trials} trials)"
        )


@dataclass(frozen=True, kw_only=True)
class GateRegret:
    """What pruning would have cost, measured on trials that passed although the rule said no.

    Attributes:
        num_spared: Such trials with a final value.
        best_spared: Their best value.
        best_kept: Best value of the trials the rule kept.
        num_pruned: Trials that the gate did prune after scoring them.
        expected: Estimated gain over the best value found, had they been trained; None where there
            are too few trials to estimate it, or none was pruned.
        expected_by: The proxy it was estimated with.
    """

    num_spared: int
    best_spared: float | None
    best_kept: float | None
    num_pruned: int = 0
    expected: float | None = None
    expected_by: str = ""

    @property
    def regret(self) -> float | None:
        """Metric lost had the rule pruned them all; None when nothing was spared."""
        if self.best_spared is None or self.best_kept is None:
            return None
        return max(0.0, self.best_spared - self.best_kept)


@dataclass(frozen=True, kw_only=True)
class PassThrough:
    """Who passed the gate without merit.

    Attributes:
        num_judged: Trials that the gate answered.
        num_controls: Passed without a look at their proxies: warm-up and random share.
        num_spared: Passed although the rule would have pruned them.
    """

    num_judged: int
    num_controls: int
    num_spared: int


@dataclass(frozen=True, kw_only=True)
class StageCompute:
    """Compute of one stage over all trials.

    Attributes:
        stage: Its name.
        resource: What is counted.
        spent: Resource seconds.
        saved_by_gate: Seconds that trials pruned before training would have taken: what the median
            complete trial took, less what they took.
        saved_by_asha: The same for trials stopped during training.
    """

    stage: str
    resource: Literal["CPU", "GPU"]
    spent: float
    saved_by_gate: float
    saved_by_asha: float


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The audit of a sweep.

    Attributes:
        final: Proxies against the final metric of complete trials.
        early: Proxies against the metric at the first common validation of all trained trials:
            more points, at a smaller but equal budget.
        early_step: That validation's step; None when no trial trained.
        regret: Of the gate's rule.
        passed: Who passed it without merit.
        compute: Spent and saved by stage and resource; rows without any are left out.
    """

    final: list[ProxyAudit]
    early: list[ProxyAudit]
    early_step: int | None
    regret: GateRegret
    passed: PassThrough
    compute: list[StageCompute]

    @property
    def lines(self) -> list[str]:
        """The verdicts on all proxies, one sentence each."""
        return [one.line for one in self.final]


def audit(
    records: Sequence[TrialRecord], *, metric: str, unstarted: Sequence[TrialRecord] = ()
) -> Audit:
    """Audits a sweep's trials.

    Args:
        records: Its trials.
        metric: That ranks them.
        unstarted: `SweepRecords.unstarted()`; they count as compute that was spent.
    """
    step = _first_common_step(records, metric)
    final = {one.key: one.value for one in records if one.state == "complete"}
    early = {one.key: _value_at(one, step, metric) for one in records if step is not None}
    audits = _correlate(records, final)
    judged = [one for one in records if one.gate or one.pruned_by == "gate"]
    return Audit(
        final=audits,
        early=_correlate(records, early),
        early_step=step,
        regret=_regret(records, audits),
        passed=PassThrough(
            num_judged=len(judged),
            num_controls=sum(one.is_control for one in judged),
            num_spared=sum(one.would_prune and one.pruned_by != "gate" for one in judged),
        ),
        compute=_compute([*records, *unstarted]),
    )


def _correlate(records: Sequence[TrialRecord], values: dict[str, float | None]) -> list[ProxyAudit]:
    measured: dict[str, tuple[Floats, Floats]] = {}
    for metric in audited():
        proxy = metric.name
        pairs = [
            (metric.sign * float(one.proxies[proxy]), float(value))
            for one in records
            if (value := values.get(one.key)) is not None and is_finite(one.proxies.get(proxy))
        ]
        if pairs:
            first, second = np.array(pairs, dtype=np.float64).T
            measured[proxy] = (first, second)
    found = {proxy: correlate(*columns) for proxy, columns in measured.items()}
    tested = {
        proxy: columns
        for proxy, columns in measured.items()
        if len(columns[0]) >= MIN_TRIALS and not math.isnan(found[proxy].spearman.value)
    }
    chance = _corrected(tested)
    return [
        ProxyAudit(
            proxy=proxy,
            num_trials=len(measured[proxy][0]),
            correlation=correlation,
            p_value=chance.get(proxy, math.nan),
        )
        for proxy, correlation in found.items()
    ]


def _corrected(tested: Mapping[str, tuple[Floats, Floats]]) -> dict[str, float]:
    """By proxy, the p-value in the direction that its correlation has."""
    groups: dict[bytes, list[str]] = {}
    for proxy, (_, values) in tested.items():
        groups.setdefault(values.tobytes(), []).append(proxy)
    above: dict[str, float] = {}
    below: dict[str, float] = {}
    # Proxies of the same trials share the shuffles, which are most of the work.
    for proxies in groups.values():
        columns = np.column_stack([tested[one][0] for one in proxies])
        tails = permutation_tails(columns, tested[proxies[0]][1])
        above |= zip(proxies, tails.above.tolist(), strict=True)
        below |= zip(proxies, tails.below.tolist(), strict=True)
    sides = [
        dict(zip(side, holm(np.array(list(side.values()))).tolist(), strict=True))
        for side in (above, below)
    ]
    return {proxy: min(side[proxy] for side in sides) for proxy in above}


def _regret(records: Sequence[TrialRecord], audits: Sequence[ProxyAudit]) -> GateRegret:
    complete = [one for one in records if one.state == "complete" and one.value is not None]
    spared = [one.value for one in complete if one.would_prune and one.value is not None]
    kept = [one.value for one in complete if not one.would_prune and one.value is not None]
    usable = [one for one in audits if one.verdict != "too few trials"]
    proxy = max(usable, key=lambda one: one.spearman.value).proxy if usable else ""
    pruned = [one for one in records if one.pruned_by == "gate" and "infeasible" not in one.proxies]
    return GateRegret(
        num_spared=len(spared),
        best_spared=max(spared, default=None),
        best_kept=max(kept, default=None),
        num_pruned=len(pruned),
        expected=_expected_gain(complete, pruned, proxy) if proxy else None,
        expected_by=proxy,
    )


def _expected_gain(
    complete: Sequence[TrialRecord], pruned: Sequence[TrialRecord], proxy: str
) -> float | None:
    """Mean gain of the best of the pruned trials over the best found.

    Their values are drawn: a rising line of the final value on the proxy's normal score, plus a
    left-out residual of a complete trial.
    """
    trained = [one for one in complete if is_finite(one.proxies.get(proxy))]
    unknown = [one for one in pruned if is_finite(one.proxies.get(proxy))]
    values = np.array([one.value for one in trained], dtype=np.float64)
    scores = METRICS[proxy].sign * np.array(
        [float(one.proxies[proxy]) for one in (*trained, *unknown)], dtype=np.float64
    )
    x, ahead = np.split(normal_scores(scores), [len(trained)])
    residuals = deleted_residuals(x, values) if unknown else None
    if residuals is None:
        return None
    slope = max(0.0, float(np.polyfit(x, values, 1)[0]))
    expected = values.mean() + slope * (ahead - x.mean())
    noise = np.random.default_rng(0).choice(residuals, size=(_DRAWS, len(unknown)))
    return float(np.maximum((expected + noise).max(axis=1) - values.max(), 0.0).mean())


_DRAWS = 2000


def _compute(records: Sequence[TrialRecord]) -> list[StageCompute]:
    rows = []
    for stage in STAGES:
        for resource in _RESOURCES:
            spent = {one.key: one.held(resource).get(stage, 0.0) for one in records}
            whole = [spent[one.key] for one in records if one.state == "complete"]
            typical = statistics.median(whole) if whole else 0.0
            saved = {
                place: sum(
                    max(0.0, typical - spent[one.key]) for one in records if one.pruned_by == place
                )
                for place in ("gate", "asha")
            }
            if any(spent.values()) or any(saved.values()):
                rows.append(
                    StageCompute(
                        stage=stage,
                        resource=resource,
                        spent=sum(spent.values()),
                        saved_by_gate=saved["gate"],
                        saved_by_asha=saved["asha"],
                    )
                )
    return rows


_RESOURCES: tuple[Resource, ...] = ("CPU", "GPU")


def _first_common_step(records: Iterable[TrialRecord], metric: str) -> int | None:
    steps = [
        {int(row["global_step"]) for row in one.history if row.get(metric) is not None}
        for one in records
        if one.history
    ]
    common = set.intersection(*steps) if steps else set()
    return min(common, default=None)


def _value_at(record: TrialRecord, step: int, metric: str) -> float | None:
    rows = [row for row in record.history if row["global_step"] == step]
    value = rows[0].get(metric) if rows else None
    return None if value is None else float(value)
