"""Training in the calling process: the same losses as a worker's, and the same ways to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forge_ray.errors import ConfigError, StoppedError
from forge_ray.gr import train
from forge_ray.gr.run_folder import CHECKPOINTS, RunFolder
from tests.gr.test_train import asking_to_stop, curve, quality, run, small

pytestmark = pytest.mark.usefixtures("process_group")
HERE = "in_process=true"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_stopped_training_continues_to_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, "whole", HERE, "seed=1")
    monkeypatch.setattr(train, "_POLL_S", 0.0)
    with asking_to_stop(tmp_path, "cut"), pytest.raises(StoppedError, match="same command"):
        run(tmp_path, "cut", HERE, "seed=1", store="other")
    assert RunFolder.open(str(tmp_path / "runs"), "cut").names(CHECKPOINTS)
    resumed = run(tmp_path, "cut", HERE, "seed=1", store="other")
    assert curve(resumed) == curve(whole)
    assert quality(resumed) == quality(whole)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_last_weights_are_published_where_they_are_asked_for(tmp_path: Path) -> None:
    settings = [HERE, "max_steps=40", "validation.every=10", "engine.learning_rate=0.03"]
    for seed in range(9):
        best = run(tmp_path, f"best-{seed}", *settings, f"seed={seed}")
        if quality(best)[-1] < max(quality(best)):
            break
    last = run(tmp_path, f"last-{seed}", *settings, f"seed={seed}", "published=last")
    assert quality(last) == quality(best)
    assert last.metrics["global_step"] == 40 > best.metrics["global_step"]
    assert last.artifact.key != best.artifact.key
    weights = [one.artifact.local("model.safetensors").read_bytes() for one in (best, last)]
    assert weights[0] != weights[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_worker_of_ray_train_has_the_same_losses(tmp_path: Path) -> None:
    here = run(tmp_path, "here", HERE, store="here")
    there = run(tmp_path, "there", "validation.aside=false", store="there")
    assert here.artifact.key == there.artifact.key
    np.testing.assert_array_equal(here.losses, there.losses)
    assert quality(here) == quality(there)


@pytest.mark.parametrize("override", ["num_workers=2", "max_workers=2", "use_gpu=true"])
def test_several_workers_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="in_process must be false with several workers"):
        small(HERE, override)
