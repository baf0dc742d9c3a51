"""The chain of stages on a small temporal log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.data.prepare import PrepareConfig, prepare
from forge_ray.data.schema import Dataset
from forge_ray.data.splits import TemporalConfig
from forge_ray.data.synthetic import SyntheticConfig, generate
from forge_ray.gr import train
from forge_ray.gr.stages import SidVariant, StagesConfig, run_stages
from forge_ray.sid.table import SidTable
from tests.gr.test_train import SMALL


def temporal_stages(store: ArtifactStore, folder: Path) -> list[Dataset]:
    size = {"num_items": 200, "num_users": 400, "branching": [4, 4], "vector_dim": 8}
    generate(SyntheticConfig(**size, num_days=20), str(folder))
    split = TemporalConfig(num_stages=3, stage_days=5, test_days=2, targets="last")
    return prepare(PrepareConfig(source=str(folder), split=split), store)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_chain_continues_and_comes_from_the_store_the_second_time(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = temporal_stages(store, tmp_path / "raw")
    rng = np.random.default_rng(0)
    path = tmp_path / "table.npz"
    np.savez(path, codes=rng.integers(0, 16, (200, 2)), item_id=stages[0].item_ids().astype(str))
    table = SidTable.from_npz(path, stages[0].item_ids())
    overrides = [f"train.{one}" for one in SMALL]
    config = load_config(
        StagesConfig, overrides=[*overrides, "train.max_steps=20", "evaluate.ks=[20,100]"]
    )
    variants = [SidVariant("random", table, path)]

    def chain() -> list[tuple[Any, ...]]:
        rows = run_stages(stages, variants, config, store=store, run_dir=str(tmp_path / "runs"))
        return [(r.stage, r.training, r.steps, r.model, r.metrics["HR@20"]) for r in rows]

    first = chain()
    ways = [(1, "continued"), (2, "continued"), (2, "scratch"), (3, "continued"), (3, "scratch")]
    assert [row[:2] for row in first] == ways
    assert {row[2] for row in first} == {20}
    parents = [store.open(row[3]).manifest.parents for row in first]
    keys = [store.open(row[3]).key for row in first]
    assert [one[0] for one in parents] == [stages[n - 1].key for n, _ in ways]
    assert [one[2:] for one in parents] == [(), (keys[0],), (), (keys[1],), ()]
    monkeypatch.setattr(train, "_fit", None)
    assert chain() == first
