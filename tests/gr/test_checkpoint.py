from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forge_ray.artifacts import ArtifactInfo, ArtifactStore
from forge_ray.data.stream import Cursor
from forge_ray.errors import ArtifactError
from forge_ray.gr.checkpoint import (
    MODEL_KIND,
    WEIGHTS_FILE,
    CheckpointManifest,
    Progress,
    RunIdentity,
    build_generator,
    load_generator,
    model_config,
    read_manifest,
    save_weights,
    table_key,
    write_manifest,
)
from forge_ray.gr.config import GrConfig
from forge_ray.gr.models.t5 import T5Config
from forge_ray.sid.table import SidTable
from tests.gr.chains import grid_table

IDENTITY = RunIdentity(
    config_hash="c" * 64,
    table_key="a" * 64,
    dataset_key="d" * 64,
    zero_stage=1,
    precision="fp32",
    world_size=2,
)
MANIFEST = CheckpointManifest(
    IDENTITY,
    Progress(step=7, cursor=Cursor(1, 2, 3), tokens=99, history=({"loss": 1.5},)),
    ("engine/shard-0.pt",),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "shard-0.pt").write_bytes(b"x")
    write_manifest(tmp_path, MANIFEST)
    return tmp_path


def test_manifest_round_trip(folder):
    assert read_manifest(folder, IDENTITY) == MANIFEST


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("config_hash", "e" * 64, "another name"),
        ("table_key", "e" * 64, "Models do not move between SID tables"),
        ("dataset_key", "e" * 64, "another name"),
        ("world_size", 4, "Resume with that number of workers"),
        ("zero_stage", 2, "another name"),
    ],
)
def test_checkpoint_of_another_run_is_refused(folder, field, value, advice):
    with pytest.raises(ArtifactError, match=f"{field} must be .* {advice}"):
        read_manifest(folder, replace(IDENTITY, **{field: value}))


def test_unsharded_checkpoint_moves_between_world_sizes(folder):
    stage_0 = replace(IDENTITY, zero_stage=0)
    write_manifest(folder, replace(MANIFEST, identity=stage_0))
    assert read_manifest(folder, replace(stage_0, world_size=4)).progress.step == 7


def test_lost_shard_is_named(folder):
    (folder / "engine" / "shard-0.pt").unlink()
    with pytest.raises(ArtifactError, match=r"1 shards of 2 workers, got none of engine/shard-0"):
        read_manifest(folder, IDENTITY)


def test_missing_manifest_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        read_manifest(tmp_path, IDENTITY)


def test_table_key_follows_the_codes():
    table = grid_table()
    other = SidTable.from_codes(np.flip(table.codes, axis=0), table.codebook_sizes)
    assert table_key(table) == table_key(grid_table())
    assert table_key(table) != table_key(other)


class TestModelArtifact:
    config = GrConfig(model=T5Config(hidden_size=32, num_layers=1, num_heads=2), max_history=7)

    def published(self, store: ArtifactStore, table: SidTable):
        torch.manual_seed(0)
        generator = build_generator(self.config.model, table)

        def produce(writer) -> ArtifactInfo:
            with writer.local_path(WEIGHTS_FILE) as path:
                save_weights(path, generator.state_dict())
            return ArtifactInfo()

        content = {"gr": self.config.identity(), "table_key": table_key(table)}
        return generator.eval(), store.build(MODEL_KIND, "t5", content, produce=produce)

    def test_weights_and_configuration_round_trip(self, store):
        table = grid_table()
        generator, artifact = self.published(store, table)
        loaded = load_generator(artifact, table)
        tokens = torch.tensor([[1, 4, 15]])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        assert torch.equal(loaded.prefill(tokens, mask)[0], generator.prefill(tokens, mask)[0])
        assert model_config(artifact) == self.config

    def test_another_table_is_refused(self, store):
        table = grid_table()
        _, artifact = self.published(store, table)
        other = replace(table, codes=np.flip(table.codes, axis=0).copy())
        with pytest.raises(ArtifactError, match="must be used with SID table"):
            load_generator(artifact, other)

    def test_another_kind_is_refused(self, store):
        artifact = store.build("sids", "x", {}, produce=lambda writer: None)
        with pytest.raises(ArtifactError, match="must be of kind 'model'"):
            load_generator(artifact, grid_table())
