"""Replays against hand counts, and the gate's promise over worlds whose best design is known."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any

import numpy as np
import pytest

from forge_ray.errors import DataError
from forge_ray.sid.metrics.registry import METRICS
from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.replay import (
    Design,
    Evidence,
    Policy,
    Replay,
    replay,
    replay_orders,
    standard_policies,
    summarize,
)

NAMES = ("backoff_bits", "lcp_held_out", "embedding_hitrate", "gini")
LIMITS = {"uniqueness": 1.0, "usage_min": 1.0, "backoff_gain": 1.0}
OFF = AshaConfig(enabled=False)
NO_GATE = Policy(name="no gate", gate=GateConfig(mode="off"), asha=OFF)


def design(key: str, final: float, proxies: dict[str, float], **fields: Any) -> Design:
    given: dict[str, Any] = {
        "curve": {100: final / 4, 200: final / 2},
        "train_cost": {100: 1.0, 200: 2.0},
        "error": 0.05,
        "proxy_cost": 0.1,
        "full_cost": 4.0,
    }
    return Design(key=key, final=final, proxies={**LIMITS, **proxies}, **{**given, **fields})


def world(seed: int, strengths: tuple[float, ...], num: int = 30) -> Evidence:
    """Designs whose proxies correlate with their quality like this; curves are noisy."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(size=num)
    weight = np.array(strengths)
    proxies = weight * quality[:, None] + np.sqrt(1 - weight**2) * rng.normal(size=(num, 4))
    noise = rng.normal(size=(num, 2)) * (0.6, 0.3)
    designs = [
        design(
            str(one),
            float(quality[one]),
            {
                name: METRICS[name].sign * value
                for name, value in zip(NAMES, proxies[one], strict=True)
            },
            curve={100: quality[one] + noise[one, 0], 200: quality[one] + noise[one, 1]},
        )
        for one in range(num)
    ]
    return Evidence(designs=tuple(designs), max_steps=400)


def test_without_pruning_everything_is_paid_for() -> None:
    evidence = world(0, (0.8, 0.0, 0.0, 0.0))
    found = replay(evidence, NO_GATE, seed=3)
    order = [evidence.designs[one] for one in np.random.default_rng(3).permutation(30)]
    goal = evidence.best.final - evidence.best.error
    first = next(place for place, one in enumerate(order, 1) if one.final >= goal)
    assert found == Replay(
        cost_to_best=4.0 * first,
        train_cost=120.0,
        proxy_cost=pytest.approx(3.0),
        regret=0.0,
        pruned_best=False,
        stopped_best=False,
        num_seen=30,
        num_pruned=0,
        num_controls=30,
    )
    assert evidence.full_cost == 120.0


def test_a_budget_ends_the_search() -> None:
    evidence = world(0, (0.8, 0.0, 0.0, 0.0))
    found = replay(evidence, dataclasses.replace(NO_GATE, budget=17.0), seed=3)
    assert (found.num_seen, found.train_cost) == (5, 20.0)
    order = np.random.default_rng(3).permutation(30)[:5]
    seen = max(evidence.designs[one].final for one in order)
    assert found.regret == pytest.approx(evidence.best.final - seen)


def test_limits_and_quantile_save_what_they_prune() -> None:
    good = design("good", 0.5, {"backoff_bits": 10.0})
    poor = design("poor", 0.1, {"backoff_bits": 12.0})
    dead = design("dead", 0.9, {"backoff_gain": 0.0, "backoff_bits": 9.0})
    evidence = Evidence(designs=(good, poor, dead), max_steps=400)
    gate = GateConfig(mode="quantile", keep_quantile=0.0, warmup=1, random_share=0.0)
    found = [
        replay(evidence, Policy(name="q", gate=gate, asha=OFF), seed=seed) for seed in range(12)
    ]
    assert all(one.pruned_best for one in found)
    assert all(one.regret == pytest.approx(0.4) for one in found)
    assert all(math.isinf(one.cost_to_best) for one in found)
    # `poor` trains where it comes before `good`, and is pruned where it comes after.
    assert {(one.train_cost, one.num_pruned) for one in found} == {(8.0, 1), (4.0, 2)}


def test_halving_pays_up_to_the_rung_that_stops() -> None:
    designs = [design(str(one), value, {}) for one, value in enumerate((0.9, 0.8, 0.1))]
    evidence = Evidence(designs=tuple(designs), max_steps=400)
    asha = AshaConfig(grace_steps=100, min_earlier=2)
    policy = Policy(name="asha", gate=GateConfig(mode="off"), asha=asha)
    for seed in range(12):
        last = int(np.random.default_rng(seed).permutation(3)[-1])
        found = replay(evidence, policy, seed=seed)
        # The third trial ends at its first rung where it lies below the median of the two before.
        below = designs[last].final < np.median(
            [one.final for one in designs if one.key != str(last)]
        )
        assert found.train_cost == (9.0 if below else 12.0)
        assert not found.stopped_best


def test_policies_of_one_seed_share_the_order_and_the_evidence_page_has_all() -> None:
    policies = standard_policies(gate=GateConfig(), asha=AshaConfig(), budget=40.0)
    assert [(one.name, one.gate.mode, one.asha.enabled) for one in policies[:6]] == [
        ("no gate", "off", False),
        ("quantile", "quantile", False),
        ("calibrated", "calibrated", False),
        ("ASHA", "off", True),
        ("quantile + ASHA", "quantile", True),
        ("calibrated + ASHA", "calibrated", True),
    ]
    for planned, other in zip(policies[:6], policies[6:12], strict=True):
        name = f"{planned.name}, promising first"
        assert other == dataclasses.replace(planned, name=name, order="promising")
    assert (policies[12].name, policies[12].budget) == ("random search", 40.0)
    assert len(standard_policies(gate=GateConfig(), asha=AshaConfig())) == 12
    evidence = world(1, (0.8, 0.0, 0.0, 0.0), num=8)
    # Too few controls to prune: the same sweep as without a gate.
    assert replay(evidence, policies[2], seed=5) == replay(evidence, policies[0], seed=5)


def test_a_summary_counts() -> None:
    evidence = world(0, (0.8, 0.0, 0.0, 0.0))
    one = replay(evidence, NO_GATE, seed=0)
    replays = [
        dataclasses.replace(one, cost_to_best=cost, pruned_best=math.isinf(cost))
        for cost in (12.0, 60.0, 24.0, math.inf)
    ]
    found = summarize(evidence, "x", replays)
    assert (found.cost_low, found.cost_to_best, found.cost_high) == (0.2, 0.5, math.inf)
    assert (found.reached, found.pruned_best, found.train_cost) == (0.75, 0.25, 1.0)
    # Clopper and Pearson's one-sided limit: the p with P(X <= 1 of 4) = .05.
    high = found.pruned_best_high
    assert (1 - high) ** 4 + 4 * high * (1 - high) ** 3 == pytest.approx(0.05)


@pytest.mark.parametrize("fault", ["none", "twice", "final", "cost"])
def test_bad_evidence_is_refused(fault: str) -> None:
    one = design("a", math.nan if fault == "final" else 0.5, {})
    if fault == "cost":
        one = dataclasses.replace(one, train_cost={})
    designs = {"none": (), "twice": (one, one)}.get(fault, (one,))
    with pytest.raises(DataError, match="design"):
        Evidence(designs=designs, max_steps=400)


NUM_WORLDS = 120


@cache
def outcomes(
    strengths: tuple[float, ...], mode: str, halving: bool, order: str = "planned"
) -> tuple[Replay, ...]:
    gate = GateConfig(mode=mode, warmup=4, keep_quantile=0.5)
    asha = AshaConfig(grace_steps=100, enabled=halving)
    policy = Policy(name=mode, gate=gate, asha=asha, order=order)  # type: ignore[arg-type]
    return tuple(replay(world(seed, strengths), policy, seed=seed) for seed in range(NUM_WORLDS))


def lost(found: tuple[Replay, ...]) -> float:
    return float(np.mean([one.pruned_best for one in found]))


def share(found: tuple[Replay, ...]) -> float:
    return float(np.mean([one.num_pruned / one.num_seen for one in found]))


SLACK = 2.6 * math.sqrt(0.1 * 0.9 / NUM_WORLDS)


@pytest.mark.parametrize("order", ["planned", "promising"])
@pytest.mark.parametrize("halving", [False, True])
@pytest.mark.parametrize("strengths", [(0.9, 0.5, 0.0, 0.0), (0.6, 0.6, 0.6, 0.0)])
def test_the_stated_risk_holds(strengths: tuple[float, ...], halving: bool, order: str) -> None:
    found = outcomes(strengths, "calibrated", halving, order)
    assert lost(found) <= 0.1 + SLACK
    assert share(found) > 0.1


def cost(found: tuple[Replay, ...]) -> float:
    return float(np.median([one.cost_to_best for one in found]))


def test_promising_designs_first_reach_the_best_sooner_and_a_useless_proxy_costs_little() -> None:
    good, useless = (0.9, 0.5, 0.0, 0.0), (0.0,) * 4
    for mode, halving in (("off", False), ("calibrated", True)):
        first = cost(outcomes(good, mode, halving, "promising"))
        assert first < 0.5 * cost(outcomes(good, mode, halving))
        blind = cost(outcomes(useless, mode, halving, "promising"))
        assert blind < 1.3 * cost(outcomes(useless, mode, halving))


def test_scores_of_all_designs_are_paid_first() -> None:
    evidence = world(0, (0.8, 0.0, 0.0, 0.0))
    policy = dataclasses.replace(NO_GATE, order="promising", budget=4.0)
    found = replay(evidence, policy, seed=0)
    assert (found.num_seen, found.train_cost) == (1, 4.0)
    assert found.proxy_cost == pytest.approx(3.0)


def test_a_useless_proxy_prunes_next_to_nothing() -> None:
    found = outcomes((0.0,) * 4, "calibrated", False)
    assert share(found) < 0.06
    assert lost(found) <= 0.1
    # The quantile rule prunes on, whatever the proxy is worth.
    trusting = outcomes((0.0,) * 4, "quantile", False)
    assert share(trusting) > 0.3
    assert lost(trusting) > 0.2


def test_orders_are_numbered_from_zero() -> None:
    evidence = world(2, (0.9, 0.5, 0.0, 0.0))
    policy = Policy(name="calibrated", gate=GateConfig(), asha=OFF)
    found = replay_orders(evidence, policy, num_orders=4)
    assert found == [replay(evidence, policy, seed=seed) for seed in range(4)]
    assert len({one.cost_to_best for one in found}) > 1
