from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.gr import _command, app
from forge_ray.errors import ConfigError
from tests.gr.chains import chain_dataset, grid_table

SMALL = [
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "validation.users=20",
    "validation.every=2",
    "max_steps=4",
]


@contextlib.contextmanager
def _already_connected(**_: Any) -> Iterator[None]:
    """The suite's Ray stays up after a command."""
    yield


@pytest.fixture
def train(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs `gr train` on the chain data with an .npz table."""
    monkeypatch.setattr("forge_ray.launch.connect.connected", _already_connected)
    dataset = chain_dataset(store)
    table = tmp_path / "grid.npz"
    np.savez(table, item_id=dataset.item_ids().astype(str), codes=grid_table().codes)
    words = ["train", str(table), "--data", dataset.artifact.uri, "--store", store.uri]
    words += ["--run-dir", str(tmp_path / "runs")]
    return lambda *more: CliRunner().invoke(app, [*words, *SMALL, *more])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_train_publishes_and_the_same_command_finds_it(train, store):
    first = train("--json")
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout)
    assert [row["global_step"] for row in record["history"]] == [2, 4]
    assert store.manifests("model")[0].ref in record["model"]
    command = store.manifests("model")[0].command
    for option in ("--data", "--name", "--run-dir", "--store"):
        assert f" {option} " in command
    assert store.uri in command
    again = train()
    assert again.exit_code == 0, again.output
    assert "ItemNDCG@10" in again.stdout
    assert len(store.manifests("model")) == 1


@pytest.mark.parametrize(
    ("published", "said"),
    [
        ("best", "best model (by validation ItemNDCG@10): a"),
        ("last", "model with the last weights"),
    ],
)
def test_the_command_says_which_weights_became_the_model(train, monkeypatch, published, said):
    artifact = SimpleNamespace(uri="a")
    result = SimpleNamespace(artifact=artifact, history=[{"global_step": 4}])
    monkeypatch.setattr("forge_ray.gr.train.train_generator", lambda *args, **given: result)
    found = train(f"published={published}")
    assert said in found.output
    assert ("best model" in found.output) is (published == "best")


def test_the_manifest_says_how_to_repeat_the_run():
    options = {"--data": "my data", "--config": Path("c.yaml"), "--name": None}
    given = _command("t.npz", ["max_steps=4"], options)
    assert given == "forge-ray gr train t.npz max_steps=4 --data 'my data' --config c.yaml"


def test_unknown_keys_are_refused_before_any_work(train):
    result = train("model.hiden_size=32")
    assert isinstance(result.exception, ConfigError)
    assert "hidden_size" in str(result.exception)
