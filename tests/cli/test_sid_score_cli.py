"""`forge-ray sid score` on foreign tables: one object per table, the form labelled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.score_view import comparison
from forge_ray.cli.sid_score import score
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from tests.evaluate.datasets import topic_dataset

app = typer.Typer()
app.command()(score)


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return topic_dataset(store)


@pytest.fixture
def tables(dataset: Dataset, tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    paths = []
    for name in ("one", "two"):
        order = rng.permutation(dataset.num_items)  # rows of a foreign file come in any order
        codes = np.stack([order % 10, order // 10], axis=1)
        np.savez(
            tmp_path / f"{name}.npz", item_id=dataset.item_ids()[order].astype(str), codes=codes
        )
        paths.append(str(tmp_path / f"{name}.npz"))
    return paths


def run(words: list[str], store: ArtifactStore) -> Any:
    return CliRunner().invoke(app, [*words, "--store", store.uri])


def as_rows(words: list[str], store: ArtifactStore) -> list[dict[str, Any]]:
    result = run([*words, "--json"], store)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_one_object_per_table_in_test_form(
    store: ArtifactStore, dataset: Dataset, tables: list[str]
) -> None:
    rows = as_rows([*tables, "--data", dataset.key], store)
    assert [row["table"] for row in rows] == ["one", "two"]
    for row in rows:
        assert row["split"] == "test"
        assert row["uniqueness"] == 1.0
        assert row["gini"] == 0.0
        assert row["embedding_hitrate_variant"] == "refit"
        assert row["backoff_bits"] < row["backoff_bits_shuffled"]


def test_split_and_settings_are_passed_on(
    store: ArtifactStore, dataset: Dataset, tables: list[str]
) -> None:
    words = [tables[0], "--data", dataset.artifact.uri, "--split", "validation", "hitrate_k=7"]
    (row,) = as_rows(words, store)
    assert row["split"] == "validation"
    assert row["embedding_hitrate_k"] == 7


def test_a_table_for_people(store: ArtifactStore, dataset: Dataset, tables: list[str]) -> None:
    result = run([*tables, "--data", dataset.key], store)
    assert result.exit_code == 0
    assert "SID scores" in result.stdout
    assert "select on" in result.stderr


def test_the_comparison_fits_its_terminal_and_marks_the_better(
    store: ArtifactStore, dataset: Dataset, tables: list[str]
) -> None:
    rows = as_rows([*tables, "--data", dataset.key, "--controls"], store)
    assert [row["control"] for row in rows] == [None, "shuffled", "random"] * 2
    console = Console(width=120, record=True)
    for part in comparison(rows * 2, width=120):
        console.print(part)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 120
    assert text.count("SID scores") == 2  # twelve tables stand in two blocks
    for name in ("uniqueness", "entropy_level_2", "order_agreement", "lcp_ratio", "backoff_bits"):
        assert text.count(f" {name} ") == 2
    best = min(row["backoff_bits"] for row in rows)
    bold = [row for row in rows if f"{row['backoff_bits']:.4f}" == f"{best:.4f}"]
    assert all(row["control"] is None for row in bold)


def test_stored_tables_know_their_dataset_and_default_to_validation(
    store: ArtifactStore, dataset: Dataset
) -> None:
    config = SidConfig(quantizer=RqKmeansConfig(levels=2, codebook_size=8))
    sids = fit_sids(config, dataset, store)
    (row,) = as_rows([sids.artifact.manifest.ref], store)
    assert row["split"] == "validation"
    assert row["embedding_hitrate_variant"] == "decoded"
    (again,) = as_rows([sids.artifact.manifest.ref], store)
    assert again == row


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{table}"], "--data must name the dataset"),
        (["hitrate_k=7"], "at least one table"),
        (["{table}", "--data", "{data}", "--split", "train"], "validation or test, got 'train'"),
        (["{table}", "--data", "{data}", "hitrate_q=7"], "hitrate_q"),
    ],
)
def test_mistakes_say_what_to_do(
    store: ArtifactStore, dataset: Dataset, tables: list[str], words: list[str], message: str
) -> None:
    result = run([word.format(table=tables[0], data=dataset.key) for word in words], store)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
