"""The scheduler's memory: what it decided and learned stands in one file, and is found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.scheduler import Decision, GateScheduler
from tests.sweep.records import METRIC


def scheduler(folder: Path) -> GateScheduler:
    return GateScheduler(
        gate=GateConfig(risk=0.2, warmup=0, random_share=0.0),
        asha=AshaConfig(grace_steps=10, min_earlier=1),
        metric=METRIC,
        max_steps=20,
        path=folder / "scheduler.json",
    )


def proxies(bits: float) -> dict[str, Any]:
    limits = {"proxy/uniqueness": 1.0, "proxy/usage_min": 1.0, "proxy/backoff_gain": 1.0}
    return {"stage": "proxy", "global_step": 0, "proxy/backoff_bits": bits, **limits}


def train(one: GateScheduler, key: str, value: float) -> None:
    one.judge(key, {"stage": "gr", "global_step": 10, METRIC: value})
    final = {"stage": "final", "global_step": 20, METRIC: value, f"row/{METRIC}_se": 0.005}
    assert one.judge(key, final) == Decision()


def test_a_restored_scheduler_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole, broken = scheduler(tmp_path / "whole"), scheduler(tmp_path / "broken")
    for index in range(12):
        # A new process each time: everything that counts is in the file.
        broken = scheduler(tmp_path / "broken")
        bits = 19.0 if index in (8, 9) else 12 - index / 10
        answers = [one.judge(str(index), proxies(bits)) for one in (whole, broken)]
        assert answers[0] == answers[1]
        assert (answers[0].pruned_by == "gate") == (index in (8, 9))
        if not answers[0].pruned_by:
            for one in (whole, broken):
                train(one, str(index), 0.01 * index)
    files = [tmp_path / name / "scheduler.json" for name in ("whole", "broken")]
    states = [json.loads(path.read_text()) for path in files]
    assert states[0] == states[1]
    assert states[0]["gate"]["finals"]["1"] == [0.01, 0.005]
    assert list(states[0]["asha"]["rungs"]) == ["10"]


def test_a_trial_that_halving_stopped_calibrates_the_gate(tmp_path: Path) -> None:
    one = scheduler(tmp_path)
    for index in range(3):
        one.judge(str(index), proxies(12 - index / 10))
        train(one, str(index), 0.01 * (index + 1))
    one.judge("cut", proxies(13.0))
    assert one.judge("cut", {"stage": "gr", "global_step": 10, METRIC: 0.001}).pruned_by == "asha"
    poor = one.judge("poor", proxies(19.0))
    assert (poor.pruned_by, poor.would_prune, poor.is_control) == ("gate", True, False)


def test_the_order_is_remembered_and_what_a_dead_driver_began_comes_first(tmp_path: Path) -> None:
    limits = {"uniqueness": 1.0, "usage_min": 1.0, "backoff_gain": 1.0}
    scores = {"a": {**limits, "backoff_bits": 12.0}, "b": {**limits, "backoff_bits": 11.0}}
    first = scheduler(tmp_path)
    first.order_by(scores)
    assert first.next_place(["a", "b", "unscored"]) == 1
    again = scheduler(tmp_path)
    again.order_by(scores)
    # `b` was picked and did not end; then it is the plan's turn.
    assert again.next_place(["a", "b", "unscored"]) == 1
    assert again.next_place(["unscored", "a"]) == 0
    picked = json.loads((tmp_path / "scheduler.json").read_text())["gate"]["picked"]
    assert picked == {"b": "promise", "unscored": "plan"}
