"""Published models: found with their table and dataset, scored once, printed beside the floors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import typer
from typer.testing import CliRunner

from forge_ray.artifacts import Artifact, ArtifactStore, ArtifactWriter
from forge_ray.cli.gr_decode import evaluate, recommend
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.errors import ArtifactError, ConfigError
from forge_ray.evaluate import evaluator
from forge_ray.gr.checkpoint import (
    MODEL_KIND,
    WEIGHTS_FILE,
    build_generator,
    save_weights,
    table_key,
)
from forge_ray.gr.config import GrConfig
from forge_ray.gr.evaluation import MAKES_ROOM, evaluate_generator
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.scoring import ModelEvaluationConfig, evaluate_model
from forge_ray.gr.source import ModelSource
from forge_ray.launch.connect import connected
from forge_ray.sid.table import SidTable
from tests.gr.datasets import tiny_dataset
from tests.gr.generators import random_codes

SIZES = (8, 8, 4)
NUM_ITEMS = 200


def publish_table(store: ArtifactStore, *, seed: int = 0) -> Artifact:
    table = SidTable.from_codes(random_codes(NUM_ITEMS, SIZES, seed=seed), SIZES)
    parents = ["codes", tiny_dataset(store).key]
    return store.build("sids", "random", {"seed": seed}, parents=parents, produce=table.save)


def publish_model(
    store: ArtifactStore, dataset: Dataset, table: SidTable, config: GrConfig | None = None
) -> Artifact:
    """An untrained decoder in the form that training publishes."""
    size = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    config = config or GrConfig(model=DecoderConfig(**size), max_history=4)

    def produce(writer: ArtifactWriter) -> None:
        torch.manual_seed(0)
        generator = build_generator(config.model, table)
        with writer.local_path(WEIGHTS_FILE) as path:
            save_weights(path, generator.state_dict())

    content = {"gr": config.identity(), "table_key": table.key}
    parents = [dataset.key, table.key]
    return store.build(MODEL_KIND, "tiny", content, parents=parents, produce=produce)


@pytest.fixture
def model(store: ArtifactStore) -> Artifact:
    return publish_model(store, tiny_dataset(store), SidTable.open(publish_table(store)))


def test_a_model_is_opened_with_what_it_was_made_from(
    store: ArtifactStore, model: Artifact
) -> None:
    source = ModelSource.open(store, "tiny-" + model.key[:12])
    loaded = source.load()
    assert source.key == model.key
    assert source.dataset.key == model.manifest.parents[0]
    assert loaded.table.key == model.manifest.parents[1]
    assert loaded.max_history == 4


def test_another_table_is_refused(store: ArtifactStore, model: Artifact) -> None:
    other = publish_table(store, seed=1)
    with pytest.raises(ArtifactError, match=f"--sids must be the SID table .* got {other.key}"):
        ModelSource.open(store, model.key, sids=other.key)
    own = model.manifest.parents[1]
    with pytest.raises(ArtifactError, match="must be used with SID table"):
        replace(ModelSource.open(store, model.key, sids=own), table=other).load()


def test_a_foreign_table_file_is_refused_for_a_model_of_another(
    store: ArtifactStore, model: Artifact, tmp_path: Path
) -> None:
    path = tmp_path / "foreign.npz"
    ids = np.array([f"item-{i}" for i in range(NUM_ITEMS)])
    np.savez(path, codes=random_codes(NUM_ITEMS, SIZES, seed=1), item_id=ids)
    with pytest.raises(ArtifactError, match="--sids must be the SID table"):
        ModelSource.open(store, model.key, sids=str(path))


def test_only_models_are_opened(store: ArtifactStore, model: Artifact) -> None:
    with pytest.raises(ArtifactError, match="must be an artifact of kind 'model', got 'sids'"):
        ModelSource.open(store, store.open(model.manifest.parents[1]).uri)


def test_rows_of_narrower_searches_are_not_taken_for_new_ones() -> None:
    given = {"split": "test", "ks": [5]}
    assert ModelEvaluationConfig(**given).identity()["makes_room"] == MAKES_ROOM != "at every level"
    for fixed in ({"exclude_seen": False}, {"widths": [5, 5, 5]}, {"constrained": False}):
        assert ModelEvaluationConfig(**given, **fixed).identity()["makes_room"] is False


def test_scores_equal_those_of_arrays_and_are_computed_once(
    store: ArtifactStore, model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource.open(store, model.key)
    config = ModelEvaluationConfig(split="test", ks=[5, 10], bootstrap=0, users_per_part=40)
    found = evaluate_model(source, source.dataset, config, store=store).metrics
    loaded = source.load()
    batches = list(source.dataset.sequence_batches("test"))
    expected = evaluate_generator(
        loaded.generator,
        loaded.table,
        Ragged.concatenate([batch.items for batch in batches]),
        Ragged.concatenate([batch.targets for batch in batches]),
        train_counts=source.dataset.train_counts(),
        max_history=4,
        ks=(5, 10),
    )
    assert found.keys() == expected.keys() | {"seconds"}
    for name in expected.keys() - {"users_per_s"}:
        assert found[name] == pytest.approx(expected[name], nan_ok=True), name
    monkeypatch.setattr(evaluator, "evaluate", None)
    config = ModelEvaluationConfig(split="test", ks=[5, 10], bootstrap=0, batch_users=64)
    assert evaluate_model(source, source.dataset, config, store=store).metrics == found


def test_a_sample_of_users(store: ArtifactStore, model: Artifact) -> None:
    source = ModelSource.open(store, model.key)
    config = ModelEvaluationConfig(users=17, ks=[5])
    found = evaluate_model(source, source.dataset, config, store=store)
    assert found.metrics["users"] == 17
    assert found.metrics["ItemHit@5_low"] <= found.metrics["ItemHit@5_high"]
    assert found.replicates["ItemHit@5"].shape == (1000,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "train"}, "split must be validation or test, got 'train'"),
        ({"ks": []}, "ks must be cut-offs >= 1"),
        ({"users": 0}, "users must be >= 1, got 0"),
        ({"batch_users": 0}, "batch_users must be >= 1, got 0"),
        ({"bootstrap": -1}, "bootstrap must be >= 0, got -1"),
        ({"num_workers": 0}, "num_workers must be >= 1, got 0"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelEvaluationConfig(**changes)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("eval")(evaluate)
    app.command("recommend")(recommend)
    return app


def test_eval_prints_the_model_beside_both_floors(
    app: typer.Typer, store: ArtifactStore, model: Artifact
) -> None:
    arguments = ["eval", model.key[:12], "--split", "test", "ks=[5,10]", "--store", store.uri]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    rows = json.loads(result.stdout)
    assert [row["model"] for row in rows] == [model.manifest.ref[6:], "popularity", "item_knn"]
    assert {row["users"] for row in rows} == {90}
    assert all(0 <= row["ItemHit@10"] <= 1 for row in rows)
    assert rows[0]["invalid_rate"] == 0
    table = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}).stdout
    for word in ("ItemNDCG@10", "SidHit@5", "popularity", "item_knn", "invalid_rate"):
        assert word in table


def test_eval_measures_the_floors_as_it_measures_the_model(
    app: typer.Typer, store: ArtifactStore, model: Artifact
) -> None:
    def rows(*settings: str) -> list[dict]:
        words = ["eval", model.key, "--store", store.uri, "--json", "ks=[10]", *settings]
        return json.loads(CliRunner().invoke(app, words).stdout)

    assert [row["users"] for row in rows("users=17")] == [17, 17, 17]
    seen, unseen = rows("exclude_seen=false"), rows()
    assert seen[2]["coverage@10"] != unseen[2]["coverage@10"]


@pytest.mark.ray
def test_recommend_writes_lists_and_reports(
    app: typer.Typer, store: ArtifactStore, model: Artifact, tmp_path: Path, ray_local: None
) -> None:
    out = tmp_path / "lists"
    arguments = ["recommend", model.key, "top_k=3", "--out", str(out), "--store", store.uri]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    report = json.loads(result.stdout)
    assert (report["users"], report["invalid_rate"]) == (90, 0)
    assert len(list((out / "lists").iterdir())) == report["parts"]


@pytest.mark.ray
def test_commands_leave_a_ray_alone_that_was_there_before(ray_local: None) -> None:
    with connected():
        pass
    assert ray.is_initialized()


def test_a_model_of_a_foreign_table_asks_for_it(store: ArtifactStore, tmp_path: Path) -> None:
    dataset = tiny_dataset(store)
    codes = random_codes(NUM_ITEMS, SIZES)
    path = tmp_path / "foreign.npz"
    np.savez(path, codes=codes, item_id=np.array([f"item-{i}" for i in range(NUM_ITEMS)]))
    foreign = SidTable.from_npz(path, dataset.item_ids())
    model = publish_model(store, dataset, replace(foreign, key=table_key(foreign)))
    with pytest.raises(ArtifactError, match="Pass --sids with the table"):
        ModelSource.open(store, model.key)
    loaded = ModelSource.open(store, model.key, sids=str(path)).load()
    np.testing.assert_array_equal(loaded.table.codes, codes)
