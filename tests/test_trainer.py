from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray._private import state

from forge_ray.trainer import ForgeTrainer
from tests.gr.processes import wait_until


def report_for_ever(settings: dict[str, Any]) -> None:
    while True:
        Path(settings["told"]).touch()
        ray.train.report({"step": 1})
        time.sleep(0.2)


@ray.remote(num_cpus=0)
class Trial:
    def train(self, folder: str, **resources: float) -> None:
        ForgeTrainer(
            report_for_ever,
            train_loop_config={"told": f"{folder}/told"},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker=resources),
            run_config=ray.train.RunConfig(name="run", storage_path=folder),
        ).fit()


def living_cleaners() -> set[str]:
    """Ids of helpers that are not dead; earlier tests of the process may have left dead ones."""
    found = {
        key: one for key, one in state.actors().items() if one["ActorClassName"] == "GroupCleaner"
    }
    return {key for key, one in found.items() if one["State"] != "DEAD"}


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_helper_of_a_training_that_ended_has_ended_in_good_order(
    ray_local: None, tmp_path: Path
) -> None:
    before = set(state.actors())
    ForgeTrainer(
        lambda: None,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="run", storage_path=str(tmp_path)),
    ).fit()
    found = {key: one for key, one in state.actors().items() if key not in before}
    (helper,) = (key for key, one in found.items() if one["ActorClassName"] == "GroupCleaner")
    wait_until(lambda: state.actors(actor_id=helper)["State"] == "DEAD", "it stayed", 60)
    assert "exit_actor" in str(state.actors(actor_id=helper)["DeathCause"])


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_controller_leaves_no_helper_and_frees_its_workers(
    ray_local: None, tmp_path: Path
) -> None:
    before = living_cleaners()
    trial = Trial.remote()
    trial.train.remote(str(tmp_path), CPU=0.5)
    wait_until((tmp_path / "told").exists, "no training", 300)
    (helper,) = living_cleaners() - before
    groups = {key for key, one in group_states().items() if one == "CREATED"}
    assert groups
    ray.kill(trial)
    wait_until(lambda: helper not in living_cleaners(), "the helper stayed", 60)
    wait_until(lambda: not held(groups), "the workers' resources stayed", 60)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_controller_killed_before_its_workers_started_frees_their_place(
    ray_local: None, tmp_path: Path
) -> None:
    before = living_cleaners(), set(group_states())
    trial = Trial.remote()
    # What nobody has: its group waits for ever.
    trial.train.remote(str(tmp_path), unheard_of=1.0)
    groups = wait_until(lambda: set(group_states()) - before[1], "no group", 300)
    ray.kill(trial)
    wait_until(lambda: living_cleaners() <= before[0], "the helper stayed", 60)
    wait_until(lambda: not held(groups), "the place stayed", 60)


def group_states() -> dict[str, str]:
    table = ray.util.placement_group_table()
    return {key: one["state"] for key, one in table.items()}


def held(groups: set[str]) -> set[str]:
    return {key for key in groups if group_states().get(key, "REMOVED") != "REMOVED"}
