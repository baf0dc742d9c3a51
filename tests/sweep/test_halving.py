from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler

from forge_ray.errors import ConfigError
from forge_ray.sweep.halving import AshaConfig, AshaState, stop_reason, value_bounds

CONFIG = AshaConfig(grace_steps=10, reduction_factor=2, min_earlier=1)


def ask(key: str, step: int, value: float, state: AshaState) -> str | None:
    return stop_reason(key, step, value, max_steps=80, state=state, config=CONFIG)


def test_milestones_end_before_the_last_step() -> None:
    assert CONFIG.milestones(80) == [10, 20, 40]
    assert CONFIG.milestones(10) == []


def test_the_first_rung_is_at_a_third_unless_said_otherwise() -> None:
    assert AshaConfig().milestones(3000) == [1000, 2000]
    assert AshaConfig().milestones(100) == [34, 68]
    assert AshaConfig(reduction_factor=4).milestones(300) == [100]
    assert AshaConfig().milestones(1) == []
    # And the rule asks the same rungs: nobody is judged before a third.
    state = AshaState()
    asked = {"max_steps": 90, "state": state, "config": AshaConfig(min_earlier=1)}
    assert stop_reason("a", 30, 0.5, **asked) is None
    assert stop_reason("b", 29, 0.1, **asked) is None
    assert stop_reason("b", 30, 0.1, **asked) is not None


def test_first_passes_worse_stops_better_passes() -> None:
    state = AshaState()
    assert ask("a", 10, 0.2, state) is None
    assert "0.1000 < 0.2000 at step 10" in (ask("b", 10, 0.1, state) or "")
    assert ask("c", 10, 0.3, state) is None


def test_agrees_with_rays_scheduler() -> None:
    reference = ASHAScheduler(
        time_attr="t", metric="m", mode="max", max_t=80, grace_period=10, reduction_factor=2
    )
    state = AshaState()
    values = {"a": 0.5, "b": 0.4, "c": 0.6, "d": 0.55, "e": 0.7, "f": 0.1}
    trials = {name: SimpleNamespace(trial_id=name) for name in values}
    alive = set(values)
    for trial in trials.values():
        reference.on_trial_add(None, trial)
    for step in (10, 20, 30, 40, 50):
        for name in sorted(alive):
            row = {"t": step, "m": values[name] + step / 1000}
            stopped = reference.on_trial_result(None, trials[name], row) == "STOP"
            assert (ask(name, step, row["m"], state) is not None) == stopped, (name, step)
            if stopped:
                alive.discard(name)


def test_restart_keeps_rungs_and_verdicts() -> None:
    state = AshaState()
    ask("a", 10, 0.2, state)
    verdict = ask("b", 10, 0.1, state)
    restored = AshaState(**json.loads(json.dumps(dataclasses.asdict(state))))
    assert ask("b", 20, 0.9, restored) == verdict
    # The survivor repeats its rung after a resume and is not counted again.
    assert ask("a", 10, 0.05, restored) is None
    assert len(restored.rungs["10"]) == 2


def test_off_and_at_the_end_nothing_stops() -> None:
    state = AshaState(rungs={"10": {"a": 1.0}})
    off = AshaConfig(enabled=False)
    assert stop_reason("b", 100, 0.0, max_steps=800, state=state, config=off) is None
    assert ask("b", 80, 0.0, AshaState(rungs={"40": {"a": 1.0}})) is None


def test_a_value_that_is_no_number_does_not_enter_a_rung() -> None:
    state = AshaState()
    assert ask("a", 10, float("nan"), state) is None
    assert ask("b", 10, 0.1, state) is None
    assert ask("c", 10, 0.2, state) is None


def test_a_rung_waits_for_enough_trials() -> None:
    config = AshaConfig(grace_steps=10, min_earlier=2)
    state = AshaState()
    for key, value, is_stopped in [("a", 0.3, False), ("b", 0.1, False), ("c", 0.1, True)]:
        reason = stop_reason(key, 10, value, max_steps=80, state=state, config=config)
        assert (reason is not None) == is_stopped


def test_a_stopped_trial_ends_no_better_than_those_ahead_of_it() -> None:
    rng = np.random.default_rng(0)
    keys = [str(one) for one in range(12)]
    rungs = {"10": dict(zip(keys, rng.normal(size=12), strict=True))}
    rungs["20"] = {key: float(rng.normal()) for key in keys[4:]}
    finals = {key: float(rng.normal()) for key in keys[8:]}
    state = AshaState(rungs=rungs, stopped=dict.fromkeys(keys[:8], "asha"))
    found = value_bounds(state, finals)
    assert sorted(found) == sorted(keys[:8])
    for key in keys[:8]:
        rung = rungs["20" if key in rungs["20"] else "10"]
        ahead = [finals[one] for one in finals if rung[one] >= rung[key]]
        assert found[key] == (min(ahead) if ahead else max(finals.values()))
    assert value_bounds(state, {}) == {}


@pytest.mark.parametrize(
    "change", [{"grace_steps": -1}, {"reduction_factor": 1.0}, {"min_earlier": 0}]
)
def test_bad_settings_are_refused(change) -> None:
    with pytest.raises(ConfigError):
        AshaConfig(**change)
