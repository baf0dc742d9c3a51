"""Parts of a real sweep are killed; it ends with the trials of one that nothing happened to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.faults import TinySweep, below, check_same, kill_one, trains
from tests.gr.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("victim", ["ray::ImplicitFunc", "ray::RayTrainWorker"])
def test_a_killed_process_of_a_trial_does_not_end_the_sweep(
    victim: str, tmp_path: Path, undisturbed: TinySweep
) -> None:
    sweep = TinySweep.make(tmp_path / "sweep")
    driver = sweep.start()
    sweep.wait(driver, trains, "a training")
    tokenizers = sweep.tokenizers()
    kill_one(driver, victim)
    output = sweep.finish(driver)
    check_same(sweep, undisturbed)
    attempts = [len(one.attempts) for one in sweep.ledger.read().trials.values()]
    is_trial = victim == "ray::ImplicitFunc"
    assert sorted(attempts) == ([1, 1, 2] if is_trial else [1, 1, 1]), output
    assert ("it starts again" in output) is is_trial
    assert {key: sweep.tokenizers()[key] for key in tokenizers} == tokenizers


@pytest.mark.parametrize("victim", ["gcs_server", "raylet/raylet"])
def test_a_dead_ray_ends_the_driver_and_the_same_command_continues(
    victim: str, tmp_path: Path, undisturbed: TinySweep
) -> None:
    sweep = TinySweep.make(tmp_path / "sweep")
    driver = sweep.start()
    sweep.wait(driver, trains, "a training")
    before, tokenizers = sweep.ledger.read(), sweep.tokenizers()
    kill_one(driver, victim)
    output = sweep.finish(driver, code=2)
    assert "Ray must live as long as this command" in output
    assert "the same command continues" in output
    wait_until(lambda: not below(driver, "ray"), "processes of the dead Ray stayed", 120)
    sweep.finish(sweep.start())
    check_same(sweep, undisturbed)
    after = sweep.ledger.read()
    for one in before.finished():
        assert len(after.trials[one.key].attempts) == 1
    assert {key: sweep.tokenizers()[key] for key in tokenizers} == tokenizers
