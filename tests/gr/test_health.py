from __future__ import annotations

import math

import pytest

from forge_ray.errors import ConfigError
from forge_ray.gr.health import VALIDATION_ERROR, LossWatch, StopConfig, best_row, has_settled


def rows(*values: float) -> list[dict[str, float]]:
    return [{"ItemNDCG@10": value} for value in values]


def test_a_falling_loss_is_left_alone():
    watch = LossWatch(StopConfig(loss_steps=3))
    assert watch.follow([5 * 0.9**step for step in range(100)], 1) == ""


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_once(loss):
    watch = LossWatch(StopConfig())
    assert watch.follow([3.0, loss, 2.0], 11) == f"a loss of {loss} at step 12"


def test_a_loss_far_above_its_best_stops_after_some_steps():
    def reason(factor: float, steps: int) -> str:
        watch = LossWatch(StopConfig(loss_factor=factor, loss_steps=steps))
        return watch.follow([2.0] * 50 + [9.0] * 60, 1)

    assert "stop.loss_factor=2 times its best (2.000) for 30 steps" in reason(2, 30)
    assert reason(2, 100) == ""
    assert reason(5, 30) == ""


def test_a_spike_is_forgiven():
    watch = LossWatch(StopConfig(loss_steps=40))
    assert watch.follow([2.0] * 50 + [9.0] * 10 + [2.0] * 50, 1) == ""


def test_the_last_good_step_stands_while_steps_are_bad():
    watch = LossWatch(StopConfig(loss_steps=40))
    assert (watch.last_good, watch.is_bad) == (0, False)
    watch.follow([2.0] * 50, 1)
    assert (watch.last_good, watch.is_bad) == (50, False)
    watch.follow([9.0] * 10, 51)
    assert watch.is_bad
    assert 50 < watch.last_good < 60
    watch.follow([2.0] * 100, 61)
    assert not watch.is_bad
    watch.follow([2.0, math.nan], 161)
    assert watch.last_good == 161


def test_a_tiny_loss_may_multiply():
    watch = LossWatch(StopConfig(loss_steps=10))
    assert watch.follow([0.01] * 50 + [0.9] * 90, 1) == ""


def test_in_pieces_it_says_the_same():
    losses = [2.0] * 20 + [9.0] * 60
    whole = LossWatch(StopConfig(loss_steps=30)).follow(losses, 1)
    watch = LossWatch(StopConfig(loss_steps=30))
    parts = [watch.follow(losses[at : at + 7], at + 1) for at in range(0, len(losses), 7)]
    assert next(part for part in parts if part) == whole


def test_patience():
    history = rows(0.1, 0.3, 0.2, 0.3)
    assert best_row(history) == 1
    assert has_settled(history, 2)
    assert not has_settled(history, 3)
    assert not has_settled(history, 0)
    assert not has_settled([], 1)


def test_failed_validations_say_nothing():
    failed = {"ItemNDCG@10": None, VALIDATION_ERROR: "MemoryError: "}
    history = [failed, *rows(0.1, 0.3), failed, failed, *rows(0.2), failed]
    assert best_row(history) == 2
    assert has_settled(history, 1)
    assert not has_settled(history, 2)
    assert best_row([failed]) == -1
    assert not has_settled([failed], 1)


@pytest.mark.parametrize(
    ("field", "value"), [("patience", -1), ("loss_factor", 1.0), ("loss_steps", 0)]
)
def test_rules(field, value):
    with pytest.raises(ConfigError, match=f"stop.{field} must be"):
        StopConfig(**{field: value})
