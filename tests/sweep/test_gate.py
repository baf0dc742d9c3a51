from __future__ import annotations

import dataclasses
import json

import pytest

from forge_ray.errors import ConfigError
from forge_ray.sweep.gate import (
    GateConfig,
    GateState,
    broken_limit,
    decide,
    infeasible_reason,
    missing_proxies,
    passes_at_random,
)

GOOD = {"uniqueness": 0.9, "usage_min": 0.9, "backoff_gain": 0.5, "backoff_bits": 12.0}
NO_LUCK = GateConfig(warmup=2, keep_quantile=0.5, random_share=0.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"uniqueness": 0.1}, "uniqueness 0.1 < 0.3"),
        ({"usage_min": 0.2}, "usage_min 0.2 < 0.5"),
        ({"backoff_gain": -0.01}, "backoff_gain -0.01 < 0.05"),
        ({"backoff_bits": float("nan")}, "backoff_bits is nan"),
        ({"infeasible": "too few codes"}, "too few codes"),
    ],
)
def test_hard_limits_spare_nobody(change, reason: str) -> None:
    # Neither warm-up nor the random share lets a broken design through.
    config = GateConfig(warmup=100, random_share=1.0)
    decision = decide("k", {**GOOD, **change}, state=GateState(), config=config)
    assert not decision.go
    assert decision.rule == "limit"
    assert decision.reason == reason


def test_bucket_limit() -> None:
    config = GateConfig(max_bucket=5)
    assert broken_limit({**GOOD, "max_bucket": 6}, config) == "max_bucket 6 > 5"
    assert broken_limit({**GOOD, "max_bucket": 5}, config) is None


def test_warmup_then_quantile() -> None:
    state = GateState()
    bits = [12.0, 12.5, 12.6, 11.9, 12.4]
    decisions = [
        decide(str(index), {**GOOD, "backoff_bits": value}, state=state, config=NO_LUCK)
        for index, value in enumerate(bits)
    ]
    assert [one.rule for one in decisions] == ["passed", "warm-up", "quantile", "passed", "passed"]
    assert [one.would_prune for one in decisions] == [False, True, True, False, False]


def test_larger_is_better_when_asked() -> None:
    config = dataclasses.replace(NO_LUCK, proxy="embedding_hitrate", warmup=0)
    state = GateState(seen={"a": 0.5, "b": 0.6})
    worse = decide("c", {**GOOD, "embedding_hitrate": 0.1}, state=state, config=config)
    better = decide("d", {**GOOD, "embedding_hitrate": 0.9}, state=state, config=config)
    assert (worse.go, better.go) == (False, True)


def test_the_same_trial_gets_the_same_answer_after_a_restart() -> None:
    state = GateState()
    decide("a", {**GOOD, "backoff_bits": 11.0}, state=state, config=NO_LUCK)
    decide("b", {**GOOD, "backoff_bits": 11.1}, state=state, config=NO_LUCK)
    first = decide("c", {**GOOD, "backoff_bits": 12.0}, state=state, config=NO_LUCK)
    restored = GateState(**json.loads(json.dumps(dataclasses.asdict(state))))
    for index in range(5):
        decide(f"x{index}", {**GOOD, "backoff_bits": 13.0}, state=restored, config=NO_LUCK)
    again = decide("c", {**GOOD, "backoff_bits": 12.0}, state=restored, config=NO_LUCK)
    assert again == first
    assert not again.go
    assert len(restored.seen) == 8


def test_random_share_has_its_size_and_ignores_order() -> None:
    config = GateConfig(random_share=0.2, seed=7)
    chosen = [key for key in map(str, range(2000)) if passes_at_random(key, config)]
    assert 320 < len(chosen) < 480
    assert chosen != [
        key for key in map(str, range(2000)) if passes_at_random(key, GateConfig(random_share=0.2))
    ]


def test_random_share_passes_and_is_marked() -> None:
    config = GateConfig(warmup=0, keep_quantile=0.0, random_share=1.0)
    state = GateState(seen={"a": 1.0})
    decision = decide("b", GOOD, state=state, config=config)
    assert (decision.go, decision.rule, decision.would_prune) == (True, "random share", True)


def test_gate_can_be_off() -> None:
    decision = decide("a", {}, state=GateState(), config=GateConfig(enabled=False))
    assert decision.go


def test_missing_proxies_are_named() -> None:
    assert missing_proxies({"uniqueness": 1.0}, GateConfig(proxy="order_agreement")) == [
        "usage_min",
        "backoff_gain",
        "order_agreement",
    ]
    assert missing_proxies({"infeasible": "x"}, GateConfig()) == []


def test_infeasible_codebooks() -> None:
    config = GateConfig(min_capacity=1.0)
    assert infeasible_reason((64, 64), 4096, config) is None
    reason = infeasible_reason((64, 64), 12_101, config)
    assert reason is not None
    assert "64 x 64 = 4,096" in reason


@pytest.mark.parametrize(
    "change",
    [
        {"keep_quantile": 1.5},
        {"random_share": -1},
        {"proxy": "embedding_hitrate_raw"},
        {"proxy": "bits"},
        {"warmup": -1},
    ],
)
def test_bad_settings_are_refused(change) -> None:
    with pytest.raises(ConfigError):
        GateConfig(**change)
