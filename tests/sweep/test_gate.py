from __future__ import annotations

import dataclasses
import json

import pytest

from forge_ray.errors import ConfigError
from forge_ray.sweep.calibration import Assessment
from forge_ray.sweep.gate import (
    GateState,
    decide,
    describe,
    late_start,
    note_scores,
    passes_at_random,
    record_final,
    trained_trials,
)
from forge_ray.sweep.limits import GateConfig, broken_limit, infeasible_reason, missing_proxies
from forge_ray.sweep.order import pick

GOOD = {"uniqueness": 0.9, "usage_min": 0.9, "backoff_gain": 0.5, "backoff_bits": 12.0}
NO_LUCK = GateConfig(mode="quantile", warmup=2, keep_quantile=0.5, random_share=0.0)
CALIBRATED = GateConfig(warmup=0, random_share=0.0, risk=0.2)


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
@pytest.mark.parametrize("mode", ["quantile", "calibrated"])
def test_hard_limits_spare_nobody(change, reason: str, mode: str) -> None:
    # Neither warm-up nor the random share lets a broken design through.
    config = GateConfig(mode=mode, proxies=["backoff_bits"], warmup=100, random_share=1.0)
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
    values = [12.0, 12.5, 12.6, 11.9, 12.4]
    decisions = [
        decide(str(index), {**GOOD, "backoff_bits": value}, state=state, config=NO_LUCK)
        for index, value in enumerate(values)
    ]
    assert [one.rule for one in decisions] == ["passed", "warm-up", "quantile", "passed", "passed"]
    assert [one.would_prune for one in decisions] == [False, True, True, False, False]


def test_larger_is_better_when_asked() -> None:
    config = dataclasses.replace(NO_LUCK, proxy="embedding_hitrate", warmup=0)
    state = GateState(seen={"a": {"embedding_hitrate": 0.5}, "b": {"embedding_hitrate": 0.6}})
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
    config = GateConfig(mode="quantile", warmup=0, keep_quantile=0.0, random_share=1.0)
    state = GateState(seen={"a": {"backoff_bits": 1.0}})
    decision = decide("b", GOOD, state=state, config=config)
    assert (decision.go, decision.rule, decision.would_prune) == (True, "random share", True)
    assert decision.is_control


def bits(value: float) -> dict[str, float]:
    return {**GOOD, "backoff_bits": value}


def trained(num: int, config: GateConfig = CALIBRATED) -> GateState:
    """A sweep whose bits rank its finished trials perfectly."""
    state = GateState()
    for index in range(num):
        assert decide(str(index), bits(12 - index / 10), state=state, config=config).go
        record_final(str(index), 0.01 * (index + 1), 0.002, state=state)
    return state


def test_calibration_waits_for_controls_and_then_prunes() -> None:
    state = trained(3)
    early = decide("early", bits(19.0), state=state, config=CALIBRATED)
    assert (early.go, early.rule, early.is_control) == (True, "warm-up", True)
    assert early.reason == "warm-up: 3 of 4 control trials are trained"
    # Trials whose training has not ended teach nothing.
    assert decide("open", bits(19.0), state=state, config=CALIBRATED).rule == "warm-up"
    state = trained(6)
    poor = decide("poor", bits(19.0), state=state, config=CALIBRATED)
    assert (poor.go, poor.rule, poor.would_prune, poor.is_control) == (
        False, "calibrated", True, False,
    )  # fmt: skip
    assert poor.reason.startswith("p = 0.200 <= 0.2 that a design of 0.0580 or more has such")
    rich = decide("rich", bits(10.0), state=state, config=CALIBRATED)
    assert (rich.go, rich.rule, rich.is_control) == (True, "passed", False)


def test_those_the_rule_let_pass_are_no_controls() -> None:
    state = trained(6)
    for key in ("rich", "richer"):
        decide(key, bits(10.0), state=state, config=CALIBRATED)
        record_final(key, 0.1, 0.002, state=state)
    named = dataclasses.replace(CALIBRATED, proxies=["backoff_bits", "uniqueness"])
    found, names = trained_trials(state, [bits(11.0)], named, stopped={})
    assert names == ["backoff_bits", "uniqueness"]
    assert found.is_control.tolist() == [True] * 4 + [False] * 4
    # Turned so that larger is better.
    assert found.proxies[0].tolist() == [-12.0, 0.9]
    assert found.lower_bound == pytest.approx(0.098)
    lucky = dataclasses.replace(CALIBRATED, random_share=1.0)
    for key, value in (("c", 10.0), ("d", 19.0)):
        decision = decide(key, bits(value), state=state, config=lucky)
        assert (decision.go, decision.is_control) == (True, True)
        assert decision.would_prune == (key == "d")


def test_calibration_without_evidence_prunes_nobody() -> None:
    state = GateState()
    for index, value in enumerate([3, 1, 4, 1.5, 5, 2]):
        decide(str(index), bits(12 - index / 10), state=state, config=CALIBRATED)
        record_final(str(index), 0.01 * value, 0.0, state=state)
    poor = decide("poor", bits(19.0), state=state, config=CALIBRATED)
    assert (poor.go, poor.rule, poor.is_control) == (True, "no evidence", True)
    assert poor.reason.startswith("no evidence that the proxies rank designs: held-out Spearman ")


def test_warmup_counts_for_both_rules() -> None:
    late = dataclasses.replace(CALIBRATED, warmup=8)
    state = trained(7, late)
    first = decide("poor", bits(19.0), state=state, config=late)
    assert (first.go, first.rule, first.would_prune) == (True, "warm-up", True)
    assert not decide("poorer", bits(19.0), state=state, config=late).go


def test_a_restored_state_gives_equal_answers() -> None:
    state = trained(6)
    restored = GateState(**json.loads(json.dumps(dataclasses.asdict(state))))
    for key, value in (("x", 19.0), ("y", 11.6), ("z", 10.0), ("x", 5.0)):
        answers = [
            decide(key, bits(value), state=one, config=CALIBRATED) for one in (state, restored)
        ]
        assert answers[0] == answers[1]
    assert dataclasses.asdict(state) == dataclasses.asdict(restored)


def test_only_proxies_that_all_have_are_compared() -> None:
    state = trained(4)
    everything = {**GOOD, "gini": 0.1, "lcp_held_out": float("nan"), "parallel_bits": 3.0}

    def compared(state: GateState, config: GateConfig, *more: dict[str, float]) -> list[str]:
        return trained_trials(state, [everything, *more], config, stopped={})[1]

    all_have = ["uniqueness", "usage_min", "backoff_bits", "backoff_gain"]
    assert compared(state, CALIBRATED) == all_have
    assert sorted(compared(GateState(), CALIBRATED)) == sorted([*all_have, "gini"])
    assert compared(GateState(), CALIBRATED, GOOD) == all_have
    named = dataclasses.replace(CALIBRATED, proxies=["gini", "backoff_bits"])
    assert compared(state, named) == ["backoff_bits"]


def test_stopped_trials_calibrate_with_their_bounds() -> None:
    state = trained(3)
    decide("cut", bits(19.0), state=state, config=CALIBRATED)
    stopped = {"cut": 0.01, "unseen": 0.5}
    found, _ = trained_trials(state, [GOOD], CALIBRATED, stopped=stopped)
    assert found.values.tolist() == [0.01, 0.02, 0.03, 0.01]
    # The incumbent is a finished trial, with its own error.
    assert found.lower_bound == pytest.approx(0.028)
    # It is the fourth control: the next one is judged.
    early = decide("early", bits(25.0), state=state, config=CALIBRATED, stopped=stopped)
    assert (early.go, early.rule) == (False, "calibrated")


def test_designs_scored_before_any_trial_are_compared_with_but_do_not_end_the_warm_up() -> None:
    scores = {str(index): bits(float(index)) for index in range(10, 20)}
    scores["beyond"] = {**bits(1.0), "uniqueness": 0.0}
    state = GateState()
    note_scores(scores, state=state, config=NO_LUCK)
    assert sorted(state.seen) == [str(index) for index in range(10, 20)]
    warm = [decide(key, scores[key], state=state, config=NO_LUCK).rule for key in ("19", "18")]
    assert warm == ["warm-up", "warm-up"]
    # The better half of all ten passes, whoever came before.
    rest = [key for key in scores if key not in {"18", "19", "beyond"}]
    went = [key for key in rest if decide(key, scores[key], state=state, config=NO_LUCK).go]
    assert went == ["10", "11", "12", "13", "14"]


def test_those_picked_for_their_promise_are_no_controls() -> None:
    state = GateState(picked={"a": "promise", "b": "plan"})
    decisions = [decide(key, GOOD, state=state, config=CALIBRATED) for key in ("a", "b")]
    assert [(one.go, one.is_control) for one in decisions] == [(True, False), (True, True)]


def test_a_final_value_that_is_no_number_is_not_kept() -> None:
    state = GateState()
    record_final("a", float("nan"), 0.1, state=state)
    record_final("b", 0.5, float("nan"), state=state)
    assert state.finals == {"b": [0.5, 0.0]}


def test_the_reason_says_which_side_of_the_risk() -> None:
    found = Assessment(
        state="tested", num_trials=12, num_controls=11, num_needed=9, spearman=0.7,
        lower_bound=0.05, p_value=0.25,
    )  # fmt: skip
    assert describe(found, risk=0.1) == (
        "p = 0.250 > 0.1 that a design of 0.0500 or more has such proxies "
        "(held-out Spearman +0.70 over 12 trained trials, 11 controls)"
    )


def test_gate_can_be_off() -> None:
    config = GateConfig(mode="off")
    decision = decide("a", {"infeasible": "too few"}, state=GateState(), config=config)
    assert (decision.go, decision.is_control) == (True, True)
    assert missing_proxies({}, config) == []


def test_missing_proxies_are_named() -> None:
    limits = ["usage_min", "backoff_gain"]
    quantile = GateConfig(mode="quantile", proxy="order_agreement")
    assert missing_proxies({"uniqueness": 1.0}, quantile) == [*limits, "order_agreement"]
    named = GateConfig(proxies=["lcp_held_out"])
    assert missing_proxies({"uniqueness": 1.0}, named) == [*limits, "lcp_held_out"]
    # Without names the calibrated rule takes what there is.
    assert missing_proxies({"uniqueness": 1.0}, GateConfig()) == limits
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
        {"mode": "on"},
        {"risk": 0.0},
        {"risk": 1.0},
        {"proxies": ["embedding_hitrate_raw"]},
    ],
)
def test_bad_settings_are_refused(change) -> None:
    with pytest.raises(ConfigError):
        GateConfig(**change)


@pytest.mark.parametrize(("takes_turns", "first"), [(False, 9), (True, 18)])
def test_a_sweep_too_short_for_the_calibrated_gate_is_told_so(
    takes_turns: bool, first: int
) -> None:
    """The sentence names the trial after which designs that proxies rank are first judged."""
    config = GateConfig(random_share=0.0, proxies=["backoff_bits"])
    state, waiting = GateState(), {str(bits): {**GOOD, "backoff_bits": bits} for bits in range(40)}
    tested = None
    for number in range(40):
        keys = list(waiting)
        place = 0
        if takes_turns:
            found = pick(
                [waiting[key] for key in keys], turn=number, state=state, config=config, stopped={}
            )
            place = found.place
            state.picked[keys[place]] = found.by
        key = keys[place]
        proxies = waiting.pop(key)
        answer = decide(key, proxies, state=state, config=config)
        if tested is None and answer.reason.startswith("p ="):
            tested = number
        record_final(key, 1 / (1 + proxies["backoff_bits"]), 0.0, state=state)
    assert tested == first
    said = {
        num: late_start(config, takes_turns=takes_turns, num_trials=num)
        for num in (first, first + 1)
    }
    assert f"after about {first} trials, this sweep has {first}" in said[first]
    assert not said[first + 1]


def test_other_modes_start_when_they_say() -> None:
    for mode in ("quantile", "off"):
        assert not late_start(GateConfig(mode=mode), takes_turns=True, num_trials=1)
    few = GateConfig(risk=0.2, warmup=6)
    assert "about 6 trials" in late_start(few, takes_turns=False, num_trials=6)
