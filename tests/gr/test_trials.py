"""Jobs as Ray Tune trials: all of them run, and a failure says what failed."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from forge_ray.errors import ConfigError, TrainingError
from forge_ray.gr.trials import fill_store


def put(path: Path) -> None:
    path.write_text(str(os.getpid()))


def refuse() -> None:
    raise ConfigError("levels must be >= 1, got 0. Raise it.")


def fail() -> None:
    raise RuntimeError("out of luck")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_all_jobs_run_in_processes_of_their_own(tmp_path: Path) -> None:
    jobs = {name: partial(put, tmp_path / name) for name in ("a", "b", "c")}
    fill_store(jobs, parallel=2, cpus=0.0, folder=str(tmp_path / "tune"))
    pids = {(tmp_path / name).read_text() for name in jobs}
    assert len(pids) == 3
    assert str(os.getpid()) not in pids
    assert not list((tmp_path / "tune").rglob("*.pkl"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_failure_is_told_after_the_others_came_to_their_end(tmp_path: Path) -> None:
    jobs = {"bad": refuse, "good": partial(put, tmp_path / "good")}
    with pytest.raises(ConfigError, match="levels must be >= 1, got 0"):
        fill_store(jobs, parallel=1, cpus=1.0, folder=str(tmp_path / "tune"))
    assert (tmp_path / "good").exists()
    with pytest.raises(TrainingError, match=r"trial 'worse' must come to its end.*out of luck"):
        fill_store({"worse": fail}, parallel=1, cpus=0.0, folder=str(tmp_path / "tune2"))
