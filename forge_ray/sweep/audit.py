"""Whether the pruning signal deserved trust: proxies against what training found, and regret.

Pure functions over trial records. The gate claims that a cheap proxy ranks designs like the metric
that costs a training; every sweep tests that claim on its own trials and says how many there were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from forge_ray.sid.metrics.registry import audited
from forge_ray.sweep.ledger import TrialRecord

MIN_TRIALS = 6
"""Fewer points say nothing about a rank correlation."""


@dataclass(frozen=True, kw_only=True)
class ProxyAudit:
    """One proxy against the metric.

    Attributes:
        proxy: Its name.
        num_trials: Trials with both values.
        spearman: Rank correlation with the metric, the proxy turned so that + is good; NaN where
            undefined.
        p_value: Two-sided, of no correlation.
    """

    proxy: str
    num_trials: int
    spearman: float
    p_value: float

    @property
    def verdict(self) -> Literal["trustworthy", "not shown", "misleading", "too few trials"]:
        """What the numbers allow to say."""
        if self.num_trials < MIN_TRIALS or math.isnan(self.spearman):
            return "too few trials"
        if self.p_value > 0.1:
            return "not shown"
        return "trustworthy" if self.spearman > 0 else "misleading"


@dataclass(frozen=True, kw_only=True)
class GateRegret:
    """What pruning would have cost, measured on trials that passed although the rule said no.

    Attributes:
        num_spared: Such trials with a final value.
        best_spared: Their best value.
        best_kept: Best value of the trials the rule kept.
    """

    num_spared: int
    best_spared: float | None
    best_kept: float | None

    @property
    def regret(self) -> float | None:
        """Metric lost had the rule pruned them all; None when nothing was spared."""
        if self.best_spared is None or self.best_kept is None:
            return None
        return max(0.0, self.best_spared - self.best_kept)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The audit of a sweep.

    Attributes:
        final: Proxies against the final metric of complete trials.
        early: Proxies against the metric at the first common validation of all trained trials:
            more points, at a smaller but equal budget.
        early_step: That validation's step; None when no trial trained.
        regret: Of the gate's quantile rule.
    """

    final: list[ProxyAudit]
    early: list[ProxyAudit]
    early_step: int | None
    regret: GateRegret


def audit(records: Sequence[TrialRecord], *, metric: str) -> Audit:
    """Audits a sweep's trials."""
    step = _first_common_step(records, metric)
    final = {one.key: one.value for one in records if one.state == "complete"}
    early = {one.key: _value_at(one, step, metric) for one in records if step is not None}
    return Audit(
        final=_correlate(records, final),
        early=_correlate(records, early),
        early_step=step,
        regret=_regret(records),
    )


def _correlate(records: Sequence[TrialRecord], values: dict[str, float | None]) -> list[ProxyAudit]:
    audits = []
    for metric in audited():
        proxy = metric.name
        pairs = [
            (metric.sign * float(one.proxies[proxy]), float(value))
            for one in records
            if (value := values.get(one.key)) is not None and _is_number(one.proxies.get(proxy))
        ]
        if pairs:
            audits.append(_spearman(proxy, pairs))
    return audits


def _spearman(proxy: str, pairs: Sequence[tuple[float, float]]) -> ProxyAudit:
    first, second = np.array(pairs, dtype=np.float64).T
    # Undefined where either side is constant, e.g. uniqueness 1 everywhere.
    is_defined = len(pairs) > 2 and np.ptp(first) > 0 and np.ptp(second) > 0
    result = stats.spearmanr(first, second) if is_defined else None
    return ProxyAudit(
        proxy=proxy,
        num_trials=len(pairs),
        spearman=float(result.statistic) if result is not None else math.nan,
        p_value=float(result.pvalue) if result is not None else math.nan,
    )


def _regret(records: Iterable[TrialRecord]) -> GateRegret:
    complete = [one for one in records if one.state == "complete" and one.value is not None]
    spared = [one.value for one in complete if one.would_prune and one.value is not None]
    kept = [one.value for one in complete if not one.would_prune and one.value is not None]
    return GateRegret(
        num_spared=len(spared),
        best_spared=max(spared, default=None),
        best_kept=max(kept, default=None),
    )


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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
