from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from forge_ray.artifacts import ArtifactInfo, ArtifactStore
from forge_ray.errors import ArtifactError
from forge_ray.gr.checkpoint import (
    MODEL_KIND,
    WEIGHTS_FILE,
    build_generator,
    load_generator,
    model_config,
    save_weights,
    table_key,
)
from forge_ray.gr.config import GrConfig
from forge_ray.gr.models.t5 import T5Config
from forge_ray.sid.table import SidTable
from tests.gr.chains import grid_table


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
