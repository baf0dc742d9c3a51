from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from forge_ray.sid.metrics.registry import audited
from forge_ray.sweep.audit import ProxyAudit, audit
from forge_ray.sweep.correlation import Interval, RankCorrelation
from forge_ray.sweep.ledger import TrialRecord
from tests.sweep.records import METRIC, trial


def test_a_proxy_that_ranks_like_the_metric_is_trusted() -> None:
    found = audit([trial(i, value=0.01 * (i + 1)) for i in range(8)], metric=METRIC)
    by_name = {one.proxy: one for one in found.final}
    assert by_name["backoff_bits"].spearman.value == pytest.approx(1.0)
    assert by_name["backoff_bits"].verdict == "trusted"
    # A Gini that grows with quality points the wrong way.
    assert by_name["gini"].verdict == "misleading"
    # Constant, or never measured: nothing can be said.
    assert math.isnan(by_name["uniqueness"].spearman.value)
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
    ("rho", "p_value", "verdict"),
    [
        (0.9, math.nan, "too few trials"),
        (math.nan, math.nan, "too few trials"),
        (0.9, 0.05, "trusted"),
        (0.9, 0.06, "no evidence"),
        (-0.9, 0.05, "misleading"),
        (-0.9, 0.06, "no evidence"),
    ],
)
def test_verdicts(rho: float, p_value: float, verdict: str) -> None:
    both = Interval(value=rho, low=rho - 0.1, high=rho + 0.1)
    found = ProxyAudit(
        proxy="x",
        num_trials=9,
        correlation=RankCorrelation(spearman=both, kendall=both),
        p_value=p_value,
    )
    assert found.verdict == verdict


def test_few_trials_have_no_verdict() -> None:
    few = audit([trial(i, value=0.01 * (i + 1)) for i in range(5)], metric=METRIC).final
    assert {one.verdict for one in few} == {"too few trials"}


def test_among_proxies_of_noise_hardly_any_is_believed() -> None:
    """Intervals of 90 % leave 0 outside for one in ten of them; the verdict counts all of them."""
    believed, outside = 0, 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        noise = [
            trial(
                i,
                value=0.05 + 0.01 * float(rng.normal()),
                proxies={one.name: float(rng.normal()) for one in audited()},
            )
            for i in range(12)
        ]
        found = audit(noise, metric=METRIC).final
        assert len(found) == len(audited())
        believed += any(one.verdict in ("trusted", "misleading") for one in found)
        outside += any(one.spearman.low > 0 or one.spearman.high < 0 for one in found)
    # One sweep in ten at most, on average, either word; three would be no surprise.
    assert believed <= 3
    assert outside > 7


def test_verdicts_are_said_plainly() -> None:
    found = audit([trial(i, value=0.01 * (i + 1)) for i in range(8)], metric=METRIC)
    said = "\n".join(found.lines)
    assert "gini: misleading (Spearman -1.00 [-1.00, -1.00], Kendall -1.00 " in said
    assert "corrected p 0.0002, 8 trials)" in said
    assert "uniqueness: nothing to say (constant, 8 trials)" in found.lines
    few = audit([trial(i, value=0.01 * (i + 1)) for i in range(2)], metric=METRIC)
    assert "gini: nothing to say (too few, 2 trials)" in few.lines


def gated(number: int, bits: float, **fields: Any) -> TrialRecord:
    return trial(
        number, state="pruned", pruned_by="gate", proxies={"backoff_bits": bits},
        attempts=[{"fit": 2.0, "score": 1.0}], would_prune=True, history=[], **fields,
    )  # fmt: skip


def test_what_pruning_saved_is_what_the_median_trial_took() -> None:
    held = {"cpus": {"fit": 0.5, "train": 2.0}, "gpus": {"train": 1.0}}
    trials = [
        trial(0, value=0.05, **held),
        trial(1, value=0.04, **{**held, "attempts": [{"fit": 2.0, "train": 50.0}]}),
        trial(2, value=0.03, **{**held, "attempts": [{"fit": 2.0, "train": 40.0}]}),
        gated(3, 12.0, **held),
        trial(4, state="pruned", pruned_by="asha", **{**held, "attempts": [{"train": 10.0}]}),
    ]
    found = {(one.stage, one.resource): one for one in audit(trials, metric=METRIC).compute}
    # 30, 50 and 40 seconds of complete trials: the median counts; two CPUs and a GPU each.
    assert set(found) == {("fit", "CPU"), ("train", "CPU"), ("train", "GPU")}
    train = found["train", "CPU"]
    assert (train.spent, train.saved_by_gate, train.saved_by_asha) == (260.0, 80.0, 60.0)
    assert found["train", "GPU"].saved_by_gate == 40.0
    assert (found["fit", "CPU"].spent, found["fit", "CPU"].saved_by_gate) == (4.0, 0.0)


def test_those_who_passed_without_merit_are_counted() -> None:
    trials = [
        trial(0, value=0.05, gate="warm-up: 0 of 9", is_control=True),
        trial(1, value=0.04, gate="random share: p", is_control=True, would_prune=True),
        trial(2, value=0.03, gate="p = 0.5 > 0.1"),
        gated(3, 12.0),
        trial(4, state="running", history=[], final={}),
    ]
    passed = audit(trials, metric=METRIC).passed
    assert (passed.num_judged, passed.num_controls, passed.num_spared) == (4, 2, 1)


def test_the_expected_regret_follows_the_proxy() -> None:
    """Bits fall by 10 per unit of the metric: poor bits cannot win, good ones would have."""
    kept = [trial(i, value=0.01 * (i + 1)) for i in range(10)]
    poor = audit([*kept, gated(10, 12.5), gated(11, 12.4)], metric=METRIC).regret
    assert (poor.num_pruned, poor.expected_by) == (2, "backoff_bits")
    rich = audit([*kept, gated(10, 8.0), gated(11, 8.1)], metric=METRIC).regret
    assert poor.expected is not None
    assert rich.expected is not None
    assert poor.expected < 0.001 < rich.expected
    assert audit(kept, metric=METRIC).regret.expected is None
    # A design that was never fitted has nothing to estimate from.
    unfit = trial(12, state="pruned", pruned_by="gate", proxies={"infeasible": "too few"})
    assert audit([*kept, unfit], metric=METRIC).regret.num_pruned == 0


def test_a_useless_proxy_leaves_the_regret_of_chance() -> None:
    rng = np.random.default_rng(0)
    values = rng.permutation(np.linspace(0.01, 0.3, 30))
    kept = [
        trial(i, value=float(value), proxies={"backoff_bits": 12 + rng.normal()})
        for i, value in enumerate(values)
    ]
    pruned = [gated(30 + i, 12 + rng.normal()) for i in range(30)]
    found = audit([*kept, *pruned], metric=METRIC).regret.expected
    # Thirty more draws of a uniform variable beat the best of thirty by about a spacing.
    assert found is not None
    assert 0.001 < found < 0.06
