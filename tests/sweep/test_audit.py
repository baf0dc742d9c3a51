from __future__ import annotations

import math

import pytest

from forge_ray.sweep.audit import ProxyAudit, audit
from tests.sweep.records import METRIC, trial


def test_a_proxy_that_ranks_like_the_metric_is_trustworthy() -> None:
    found = audit([trial(i, value=0.01 * (i + 1)) for i in range(8)], metric=METRIC)
    by_name = {one.proxy: one for one in found.final}
    assert by_name["backoff_bits"].spearman == pytest.approx(1.0)
    assert by_name["backoff_bits"].verdict == "trustworthy"
    # A Gini that grows with quality points the wrong way.
    assert by_name["gini"].verdict == "misleading"
    # Constant, or never measured: nothing can be said.
    assert math.isnan(by_name["uniqueness"].spearman)
    assert by_name["uniqueness"].verdict == "too few trials"
    assert "embedding_hitrate" not in by_name


def test_early_audit_counts_pruned_trials_too() -> None:
    trials = [
        trial(0, value=0.05),
        trial(1, state="pruned", pruned_by="asha", history=[{"global_step": 10, METRIC: 0.1}]),
        trial(2, state="pruned", pruned_by="gate", history=[]),
    ]
    found = audit(trials, metric=METRIC)
    assert found.early_step == 10
    assert {one.num_trials for one in found.early} == {2}
    assert {one.num_trials for one in found.final} == {1}


def test_regret_is_what_the_rule_would_have_cost() -> None:
    trials = [
        trial(0, value=0.05),
        trial(1, value=0.07, would_prune=True),
        trial(2, value=0.01, would_prune=True),
    ]
    regret = audit(trials, metric=METRIC).regret
    assert regret.regret == pytest.approx(0.02)
    assert regret.num_spared == 2
    assert audit(trials[:1], metric=METRIC).regret.regret is None


def test_nothing_to_audit() -> None:
    found = audit([], metric=METRIC)
    assert (found.final, found.early, found.early_step) == ([], [], None)


@pytest.mark.parametrize(
    ("num", "rho", "p", "verdict"),
    [
        (5, 0.9, 0.01, "too few trials"),
        (9, 0.9, 0.01, "trustworthy"),
        (9, -0.9, 0.01, "misleading"),
        (9, 0.3, 0.4, "not shown"),
    ],
)
def test_verdicts(num: int, rho: float, p: float, verdict: str) -> None:
    assert ProxyAudit(proxy="x", num_trials=num, spearman=rho, p_value=p).verdict == verdict
