"""Metrics of checkpoints: computed here, in a process of its own, and when that process fails."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors import SafetensorError

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.gr.checkpoint import WEIGHTS_FILE, RunIdentity, save_weights
from forge_ray.gr.config import GrConfig, ValidationConfig
from forge_ray.gr.health import VALIDATION_WARNING
from forge_ray.gr.loop import TrainJob
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.run_folder import BEST, CHECKPOINTS, RunFolder, checkpoint_name
from forge_ray.gr.train import _validation
from forge_ray.gr.validation import (
    AsideValidation,
    CheckpointValidator,
    InlineValidation,
    Sample,
    validation_sample,
)
from forge_ray.gr.vocab import vocab_of
from tests.gr.chains import chain_dataset, grid_table, swinging_dataset

MODEL = DecoderConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
STEP = 20


@pytest.fixture
def job(store: ArtifactStore, tmp_path: Path) -> TrainJob:
    """A run with one checkpoint."""
    validation = ValidationConfig(users=30, ks=[10], widths=[5, 10])
    folder = RunFolder.open(str(tmp_path), "run")
    torch.manual_seed(0)
    table = grid_table()
    weights = MODEL.build(vocab_of(table.codebook_sizes)).state_dict()
    with folder.new_checkpoint(checkpoint_name(STEP)) as local:
        save_weights(local / WEIGHTS_FILE, weights)
    return TrainJob(
        config=GrConfig(model=MODEL, validation=validation),
        dataset=chain_dataset(store),
        codebook_sizes=table.codebook_sizes,
        identity=RunIdentity("c", "t", "d", 1, "fp32"),
        folder=folder,
        started=time.time(),
    )


def here(job: TrainJob) -> CheckpointValidator:
    return CheckpointValidator(job, grid_table().codes, device="cpu")


def with_validation(job: TrainJob, **changes: Any) -> TrainJob:
    validation = replace(job.config.validation, **changes)
    return replace(job, config=replace(job.config, validation=validation))


def figures(metrics: dict[str, float]) -> dict[str, float]:
    """What two computations must agree on."""
    return {name: value for name, value in metrics.items() if "_s" not in name}


def test_the_weights_of_a_new_best_are_kept(job):
    metrics = here(job).run(STEP, best=-1.0)
    assert metrics["users"] == 30
    assert job.folder.names(BEST) == ["step_00000020.safetensors"]
    kept = Path(job.folder.path(BEST, "step_00000020.safetensors")).read_bytes()
    assert (
        kept == Path(job.folder.path(CHECKPOINTS, checkpoint_name(STEP), WEIGHTS_FILE)).read_bytes()
    )


def test_weights_that_gain_nothing_are_not_kept(job):
    here(job).run(STEP, best=1.0)
    assert job.folder.names(BEST) == []


def test_validation_users_are_needed(job):
    with pytest.raises(ConfigError, match="dataset must have validation users"):
        validation_sample(job.dataset, 0)


@pytest.mark.parametrize("excludes", [True, False])
def test_users_who_swing_between_two_items_are_found_if_seen_items_stay(job, store, excludes):
    """With all SIDs in the beams and the lists."""
    swinging = replace(job, dataset=swinging_dataset(store))
    wide = {"users": 40, "ks": [10, 120], "widths": [10, 120]}
    metrics = here(with_validation(swinging, exclude_seen=excludes, **wide)).run(STEP, best=1.0)
    assert metrics["ItemHit@120"] == (0.0 if excludes else 1.0)
    warning = metrics.get(VALIDATION_WARNING, "")
    assert ("of 40 rows among 120 items, and 40 of them ask for an item of their" in warning) is (
        excludes
    )


def test_rows_with_a_target_in_their_history_are_counted():
    """Items of one row are not those of the next, and a row counts once."""
    rows = {"histories": [[1, 2], [3], [], [4, 5]], "targets": [[3, 9], [3, 1], [3], [5, 4]]}
    given = {name: Ragged.from_lists(one, dtype=np.int32) for name, one in rows.items()}
    assert Sample(**given).num_seen() == 2


def test_the_rule_of_seen_items_is_part_of_a_model_only_where_it_is_not_the_default():
    """Keys of models from before there was a choice."""
    default, other = (
        GrConfig(validation=ValidationConfig(exclude_seen=one)).identity() for one in (True, False)
    )
    assert "exclude_seen" not in default["validation"]
    assert other["validation"] == {**default["validation"], "exclude_seen": False}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
class TestAside:
    def test_a_process_of_its_own_gives_the_same_figures_until_it_is_lost(self, job, caplog):
        expected = figures(here(job).run(STEP, best=1.0))
        aside = AsideValidation(job, grid_table().codes, here(job))
        aside.submit(STEP, -1.0)
        deadline = time.monotonic() + 120
        while not aside.is_ready():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert figures(aside.result()) == expected
        assert job.folder.names(BEST) == ["step_00000020.safetensors"]
        ray.kill(aside._process)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                aside.submit(STEP, 1.0)
                assert figures(aside.result()) == expected
        assert caplog.text.count("the validation process was lost") == 1

    def test_an_error_inside_the_process_is_raised_as_itself_and_the_process_stays(self, job):
        expected = figures(here(job).run(STEP, best=1.0))
        weights = Path(job.folder.path(CHECKPOINTS, checkpoint_name(STEP), WEIGHTS_FILE))
        whole = weights.read_bytes()
        aside = AsideValidation(job, grid_table().codes, here(job))
        ray.get(aside._up)
        weights.write_bytes(whole[:100])
        aside.submit(STEP, 1.0)
        with pytest.raises(SafetensorError):
            aside.result()
        weights.write_bytes(whole)
        aside.submit(STEP, 1.0)
        assert figures(aside.result()) == expected

    @pytest.mark.parametrize("wanted", [{"cpus": 1000.0}, {"gpus": 1000.0}])
    def test_without_room_for_the_process_rank_0_validates(self, job, wanted):
        crowded = with_validation(job, **wanted)
        expected = figures(here(job).run(STEP, best=1.0))
        aside = AsideValidation(crowded, grid_table().codes, here(crowded))
        aside.submit(STEP, -1.0)
        assert not aside.is_ready()
        assert figures(aside.result()) == expected

    def test_the_configuration_says_who_validates(self, job):
        codes = ray.put(grid_table().codes)
        assert isinstance(_validation(job, codes), AsideValidation)
        assert isinstance(_validation(with_validation(job, aside=False), codes), InlineValidation)
