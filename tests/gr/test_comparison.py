"""The comparison table: its rows, its paired differences, its command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from forge_ray.artifacts import Artifact, ArtifactStore
from forge_ray.cli.gr_compare import compare as command
from forge_ray.errors import ConfigError
from forge_ray.evaluate import evaluator
from forge_ray.evaluate.item_knn import ItemKnnConfig
from forge_ray.evaluate.sasrec import SasRecBaselineConfig
from forge_ray.gr.comparison import BASELINES, CompareConfig, NamedTable, compare
from forge_ray.gr.markov import MarkovConfig
from forge_ray.gr.source import ModelSource
from forge_ray.sid.table import SidTable
from tests.evaluate.datasets import topic_dataset
from tests.gr.datasets import tiny_dataset
from tests.gr.generators import random_codes
from tests.gr.test_scoring import NUM_ITEMS, SIZES, publish_model, publish_table

CHEAP = ["popularity", "item_knn", "item_knn_tuned", "markov_backoff"]


@pytest.fixture
def model(store: ArtifactStore) -> Artifact:
    return publish_model(store, tiny_dataset(store), SidTable.open(publish_table(store)))


@pytest.fixture
def run(store: ArtifactStore) -> typer.Typer:
    app = typer.Typer()
    app.command()(command)

    def call(*words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--store", store.uri], env={"COLUMNS": "160"})

    return call


def test_rows_come_from_one_evaluator_and_are_kept(
    run, model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [model.key[:12], "--split", "test", "ks=[5,10]", f"baselines=[{','.join(CHEAP)}]"]
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["model"] for row in rows] == [model.manifest.ref[6:], *CHEAP]
    for row in rows:
        assert row["users"] == 90
        assert 0 <= row["ItemHit@10_low"] <= row["ItemHit@10"] <= row["ItemHit@10_high"] <= 1
        assert row["HR@10"] >= row["HR@5"]
    assert [("SidHit@10" in row) for row in rows] == [True, False, False, False, True]
    monkeypatch.setattr(evaluator, "evaluate", None)
    assert json.loads(run(*words, "--json").stdout) == rows
    table = run(*words).stdout
    for word in ("ItemNDCG@10 95 %", "HR@5", "markov_backoff", "ItemHit@10/cold", "invalid_rate"):
        assert word in table


def test_differences_are_paired(run, model: Artifact) -> None:
    words = [model.key, "--split", "test", "ks=[10]", "baselines=[popularity,item_knn]"]
    found = json.loads(run(*words, "--against", "popularity", "--json").stdout)
    assert found["against"] == "popularity"
    assert {one["model"] for one in found["differences"]} == {
        model.manifest.ref[6:],
        "item_knn",
    }
    rows = {row["model"]: row for row in found["rows"]}
    for one in found["differences"]:
        own = rows[one["model"]][one["metric"]] - rows["popularity"][one["metric"]]
        assert one["difference"] == pytest.approx(own)
        assert one["low"] <= own <= one["high"]
        assert one["is_decided"] == (one["low"] > 0 or one["high"] < 0)
    table = run(*words, "--against", "popularity").stdout
    assert "Difference to popularity" in table


def test_baselines_need_no_model(run, store: ArtifactStore, tmp_path: Path) -> None:
    dataset = tiny_dataset(store)
    path = tmp_path / "foreign.npz"
    np.savez(path, codes=random_codes(NUM_ITEMS, SIZES), item_id=dataset.item_ids().astype(str))
    words = ["--data", dataset.key, "ks=[5]", "baselines=[item_knn,markov_backoff]", "--json"]
    rows = json.loads(run(*words, "--sids", str(path)).stdout)
    assert [row["model"] for row in rows] == ["item_knn", "markov_backoff"]
    other = publish_table(store, seed=1)
    both = json.loads(run(*words, "--sids", str(path), "--sids", other.key).stdout)
    assert [row["model"] for row in both[1:]] == ["markov_backoff foreign", "markov_backoff random"]
    assert both[1]["ItemHit@5"] == rows[1]["ItemHit@5"]
    seeds = [other.key, publish_table(store, seed=2).key]
    same = json.loads(run(*words, *(word for key in seeds for word in ("--sids", key))).stdout)
    assert [row["model"] for row in same[1:]] == [
        f"markov_backoff random-{key[:12]}" for key in seeds
    ]
    assert same[1]["ItemHit@5"] == both[2]["ItemHit@5"]
    plain = run("--data", dataset.key, "ks=[5]", "baselines=[item_knn]").stdout
    assert "HR@5" in plain
    assert "SidHit" not in plain


def test_a_table_beside_a_model_is_not_taken_for_its_own(
    run, model: Artifact, store: ArtifactStore, tmp_path: Path
) -> None:
    """Also where the store holds the model's row, so that nothing loads the model."""
    path, dataset = tmp_path / "foreign.npz", tiny_dataset(store)
    codes = random_codes(NUM_ITEMS, SIZES, seed=5)
    np.savez(path, codes=codes, item_id=dataset.item_ids().astype(str))
    plain = [model.key, "ks=[5]", "--json"]
    row = json.loads(run(*plain, "baselines=[]").stdout)
    both = json.loads(run(*plain, "baselines=[markov_backoff]", "--sids", str(path)).stdout)
    alone = ["--data", dataset.key, "ks=[5]", "baselines=[markov_backoff]", "--json"]
    foreign = json.loads(run(*alone, "--sids", str(path)).stdout)
    own = json.loads(run(*alone, "--sids", model.manifest.parents[1]).stdout)
    assert [one["ItemHit@5"] for one in both] == [
        one["ItemHit@5"] for one in (*row, *own, *foreign)
    ]


def test_a_table_of_another_catalogue_is_refused(
    run, model: Artifact, store: ArtifactStore
) -> None:
    other = tiny_dataset(store, num_items=150).key
    words = ["--data", other, "ks=[5]", "baselines=[markov_backoff]"]
    result = run(*words, "--sids", model.manifest.parents[1])
    assert isinstance(result.exception, ConfigError)
    assert "a SID table must code the items of" in str(result.exception)


def test_the_row_to_compare_with_is_looked_for_before_any_work(
    run, model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "evaluate", None)
    for words, message in (
        (["--against", "typo"], "--against must name a row"),
        (["--against", "popularity", "bootstrap=0"], "bootstrap must be > 0"),
    ):
        result = run(model.key, "ks=[7]", "baselines=[popularity]", *words)
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["baselines=[popularity]"], "--data must name a dataset"),
        (["baselines=[bert]"], "baselines must be among popularity"),
        (["MODEL", "ks=[5]", "baselines=[popularity]", "--against", "x"], "must name a row"),
        (["MODEL", "ks=[5]", "bootstrap=0", "baselines=[popularity]", "--against", "popularity"],
         "bootstrap must be > 0"),
        (["--data", "DATA", "baselines=[]"], "must have a row"),
        (["--data", "DATA", "ks=[5]"], "markov_backoff must have a SID table"),
        (["MODEL", "MODEL", "ks=[5]", "baselines=[]"], "rows must be named once each, got tiny-"),
        (["MODEL", "baselines=[item_knn,item_knn]"], "named once each, got item_knn again"),
    ],
)  # fmt: skip
def test_bad_questions_are_answered(run, model: Artifact, words: list[str], message: str) -> None:
    known = {"MODEL": model.key, "DATA": model.manifest.parents[0]}
    result = run(*[known.get(word, word) for word in words])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_model_of_another_dataset_is_refused(store: ArtifactStore, model: Artifact) -> None:
    source = ModelSource.open(store, model.key)
    with pytest.raises(ConfigError, match="must belong to dataset"):
        compare([source], topic_dataset(store), CompareConfig(ks=[5]), store=store)


@pytest.mark.parametrize(
    ("row", "section"),
    [
        ("item_knn", {"item_knn": ItemKnnConfig(history=1)}),
        ("markov_backoff", {"markov_backoff": MarkovConfig(em_steps=1)}),
        ("sasrec", {"sasrec": SasRecBaselineConfig(dim=8, layers=1, epochs=1)}),
    ],
)
def test_sections_reach_their_rows(store: ArtifactStore, row: str, section: dict) -> None:
    dataset = topic_dataset(store, num_users=100)
    codes = np.column_stack([np.arange(300) % 10, np.arange(300) // 10 % 30])
    table = NamedTable("grid", "0" * 64, lambda: SidTable.from_codes(codes, (10, 30)))
    usual = {"sasrec": SasRecBaselineConfig(dim=4, layers=1, epochs=1)}
    found = [
        compare([], dataset, CompareConfig(ks=[5], baselines=[row], **one), store=store,
                tables=[table]).rows[row].metrics
        for one in (usual, section)
    ]  # fmt: skip
    assert found[0]["ItemNDCG@5"] != found[1]["ItemNDCG@5"]


def test_all_rows_stand_in_a_table_by_default() -> None:
    assert CompareConfig().baselines == list(BASELINES)
    assert CompareConfig().ks == [5, 10, 20, 100, 500, 1000]
