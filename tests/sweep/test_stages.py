"""The stages on the real library, on a catalogue of a few items."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.sweep.config import EvaluationConfig, ResourceConfig
from forge_ray.sweep.stages import ForgeStages
from tests.evaluate.datasets import topic_dataset


@pytest.mark.ray
def test_what_the_store_answers_is_told(ray_local, store: ArtifactStore, tmp_path: Path) -> None:
    dataset = topic_dataset(store)
    stages = ForgeStages(
        store_uri=store.uri,
        dataset_key=dataset.key,
        run_dir=str(tmp_path),
        score={},
        asked=ResourceConfig(),
        evaluation=EvaluationConfig(),
        sweep="s",
    )
    config = {"sid": {"quantizer": {"kind": "random", "levels": 2, "codebook_size": 16}}}
    assert stages.tokenize(config).cached == ()
    again = stages.tokenize(config)
    assert again.cached == ("fit", "score")
    assert again.metrics["num_sids"] > 0
    other = {"sid": {**config["sid"], "resolver": {"kind": "extra_token"}}}
    assert stages.tokenize(other).cached == ("fit",)
