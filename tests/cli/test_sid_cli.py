"""`forge-ray sid fit` and `sid show`: what a person and a program get to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.sid import app, bucket_histogram
from forge_ray.data.schema import Dataset
from forge_ray.errors import ArtifactError, ConfigError
from forge_ray.sid.table import SidTable
from tests.evaluate.datasets import topic_dataset

SMALL = ["quantizer.levels=2", "quantizer.codebook_size=8"]


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return topic_dataset(store)


def run(store: ArtifactStore, *words: str) -> Any:
    return CliRunner().invoke(app, [*words, "--store", store.uri])


def as_json(store: ArtifactStore, *words: str) -> Any:
    result = run(store, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_fit_then_show(store: ArtifactStore, dataset: Dataset) -> None:
    fitted = as_json(store, "fit", dataset.key, *SMALL, "resolver.kind=knn_cap")
    assert fitted["items"] == 300
    assert fitted["codebook_sizes"] == "8x8"
    assert fitted["usage_level_1"] == 1.0
    assert 0 < fitted["uniqueness_raw"] <= 1
    shown = as_json(store, "show", fitted["table"])
    assert shown["resolver"] == "knn_cap"
    assert sum(row["items"] for row in shown["buckets"]) == 300
    first = shown["examples"][0]
    assert first["item"] == "i0000"
    code_1, code_2 = (int(code) for code in first["codes"].split())
    assert first["sid"] == f"C{code_1}C{code_2 + 8}"
    assert "Items per SID" in run(store, "show", fitted["table"]).stdout


def test_overrides_win_over_the_file(
    store: ArtifactStore, dataset: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "sid.yaml"
    path.write_text("quantizer: {levels: 2, codebook_size: 4}\n")
    fitted = as_json(store, "fit", dataset.key, "quantizer.levels=3", "--config", str(path))
    assert fitted["codebook_sizes"] == "4x4x4"


def test_mistakes_are_errors_the_user_can_act_on(store: ArtifactStore, dataset: Dataset) -> None:
    result = run(store, "fit", dataset.key, "quantizer.level=3")
    assert isinstance(result.exception, ConfigError)
    result = run(store, "show", dataset.key)
    assert isinstance(result.exception, ArtifactError)


def test_histogram_counts_sids_and_items() -> None:
    codes = np.repeat(np.arange(4), [1, 1, 3, 12])[:, None]
    rows = bucket_histogram(SidTable.from_codes(codes, [4]))
    assert rows == [
        {"items_per_sid": "1", "sids": 2, "items": 2},
        {"items_per_sid": "3–4", "sids": 1, "items": 3},
        {"items_per_sid": "10–12", "sids": 1, "items": 12},
    ]
