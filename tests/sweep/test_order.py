"""Who trains next: promise and plan in turn, and what promise means at each stage of a sweep."""

from __future__ import annotations

import numpy as np

from forge_ray.sweep.gate import GateState, decide, record_final
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.order import Pick, pick

GOOD = {"uniqueness": 0.9, "usage_min": 0.9, "backoff_gain": 0.5}
CONFIG = GateConfig(proxies=["backoff_bits", "gini"], risk=0.2, random_share=0.0)


def proxies(bits: float, gini: float = 0.5) -> dict[str, float]:
    return {**GOOD, "backoff_bits": bits, "gini": gini}


def next_of(waiting: list[dict[str, float]], *, turn: int = 0, state: GateState) -> Pick:
    return pick(waiting, turn=turn, state=state, config=CONFIG, stopped={})


def trained(rows: list[tuple[dict[str, float], float]]) -> GateState:
    state = GateState()
    for index, (row, value) in enumerate(rows):
        decide(str(index), row, state=state, config=CONFIG)
        record_final(str(index), value, 0.001, state=state)
    return state


def test_promise_and_plan_take_turns() -> None:
    waiting = [proxies(12.0), proxies(11.0), proxies(13.0)]
    assert next_of(waiting, turn=0, state=GateState()) == Pick(place=1, by="promise")
    assert next_of(waiting, turn=1, state=GateState()) == Pick(place=0, by="plan")
    assert next_of(waiting, turn=2, state=GateState()) == Pick(place=1, by="promise")


def test_designs_without_scores_wait_for_the_plan() -> None:
    waiting: list[dict[str, float]] = [{}, proxies(12.0), {"backoff_bits": float("nan")}]
    assert next_of(waiting, state=GateState()) == Pick(place=1, by="promise")
    assert next_of([{}, {}], state=GateState()) == Pick(place=0, by="plan")


def test_trained_designs_decide_which_proxy_is_followed() -> None:
    rng = np.random.default_rng(0)
    # Gini ranks these, bits do not.
    gini = np.linspace(0.1, 0.9, 8)
    rows = [(proxies(float(rng.uniform(10, 14)), one), 0.05 - 0.04 * one) for one in gini]
    waiting = [proxies(10.0, gini=0.8), proxies(14.0, gini=0.2)]
    assert next_of(waiting, state=GateState()).place == 0
    assert next_of(waiting, state=trained(rows)).place == 1


def test_many_trained_designs_are_weighed_together() -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(40, 2))
    rows = [
        (proxies(12 - bits, 0.5 - 0.1 * gini), float(0.05 + 0.01 * (bits + gini)))
        for bits, gini in table
    ]
    # Each is best in one proxy; the middle one is good in both.
    waiting = [proxies(11.0, 0.9), proxies(11.2, 0.42), proxies(14.0, 0.4)]
    assert next_of(waiting, state=trained(rows)) == Pick(place=1, by="promise")


def test_without_evidence_the_plan_goes_on() -> None:
    values = [0.03, 0.01, 0.04, 0.015, 0.05, 0.02]
    rows = [(proxies(12 - index / 10), value) for index, value in enumerate(values)]
    waiting = [proxies(14.0), proxies(10.0)]
    assert next_of(waiting, state=trained(rows)) == Pick(place=0, by="plan")
    # Too few to say so: the gate's proxy is followed.
    assert next_of(waiting, state=trained(rows[:3])) == Pick(place=1, by="promise")
