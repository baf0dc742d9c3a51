"""`forge-ray embed`: options become configuration, the result says how to go on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.embed import app
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from tests.embed.encoders.models import catalogue, text_model, titles


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return catalogue(store, {"title": titles(60), "brand": titles(60, seed=1)})


def run(store: ArtifactStore, *words: str) -> Any:
    return CliRunner().invoke(app, [*words, "--store", store.uri])


@pytest.mark.ray
def test_text_from_the_command_line(
    ray_local: None, store: ArtifactStore, dataset: Dataset, tmp_path: Path
) -> None:
    model = text_model(tmp_path / "bert")
    words = ["text", dataset.key, "--model", model, "--columns", "title, brand", "--name", "words"]
    result = run(store, *words, "max_tokens=8", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["space"], facts["items"], facts["dim"]) == ("words", 60, 16)
    (manifest,) = store.manifests("vectors")
    assert manifest.config["columns"] == ["title", "brand"]
    assert manifest.config["max_tokens"] == 8
    again = run(store, *words, "max_tokens=8")
    assert "next: forge-ray sid fit" in again.output
    assert "vectors.space=words" in again.output
    rebuilt = run(store, *shlex.split(manifest.command)[2:], "--json")
    assert json.loads(rebuilt.stdout)["vectors"] == manifest.ref


@pytest.mark.ray
def test_mistakes_are_one_line(ray_local: None, store: ArtifactStore, dataset: Dataset) -> None:
    nothing = run(store, "text", dataset.key)
    assert isinstance(nothing.exception, ConfigError)
    assert "Set --model" in str(nothing.exception)
    columns = run(store, "image", dataset.key, "--model", "x/y")
    assert "columns of the items, got 'image_path'" in str(columns.exception)
