"""Search from raw files to lists, by the commands alone."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
import pytest
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli import build_app
from forge_ray.errors import ConfigError
from tests.gr.searches import title

ITEMS, USERS = 120, 150
TRAIN = [
    "model.kind=pretrained_decoder",
    "model.fresh=true",
    "tasks.queries=shop-synthetic",
    "tasks.search=1",
    "tasks.item_to_sid=0.5",
    "tasks.sid_to_text=0.25",
    "tasks.validate=search",
    "validation.users=50",
    "validation.ks=[5,10]",
    "engine.global_batch=32",
]

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


@contextlib.contextmanager
def _already_connected(**_: Any) -> Iterator[None]:
    """The suite's Ray stays up after a command."""
    yield


@pytest.fixture
def forge(
    tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs a command in the folder of the test and reads its JSON."""
    for module in ("cli.data", "cli.data_queries", "launch.connect"):
        monkeypatch.setattr(f"forge_ray.{module}.connected", _already_connected)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Any:
        done = CliRunner().invoke(build_app(words), [*words, "--store", store.uri, "--json"])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


def write_shop(folder: Path) -> None:
    """Users walk over neighbours; titles spell the items' places on a grid."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with (folder / "interactions.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["user_id", "item_id", "timestamp"])
        for user in range(USERS):
            start = int(rng.integers(ITEMS))
            for at in range(int(rng.integers(4, 9))):
                rows.writerow([f"u{user}", f"i{(start + 7 * at) % ITEMS:03d}", at])
    with (folder / "items.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["item_id", "title"])
        rows.writerows([f"i{item:03d}", title(item)] for item in range(ITEMS))


def prepare(forge: Callable[..., Any], tmp_path: Path) -> Path:
    """Dataset, queries, an untrained checkpoint and a SID table of places on the grid."""
    write_shop(tmp_path / "raw")
    forge("data", "prepare", "raw", "name=shop", "num_shards=2")
    made = forge("data", "queries", "shop")
    assert made["source"].startswith("synthetic")
    forge("gr", "untrained", "shop", "small", "hidden_size=32", "num_layers=1", "num_heads=2",
          "intermediate_size=32", "vocab_size=300")  # fmt: skip
    places = np.array([[item // 12, item % 12] for item in range(ITEMS)], dtype=np.uint8)
    np.savez("grid.npz", item_id=np.array([f"i{item:03d}" for item in range(ITEMS)]), codes=places)
    return tmp_path / "grid.npz"


def train(forge: Callable[..., Any], *more: str) -> Any:
    words = ["gr", "train", "grid.npz", "--data", "shop", "--name", "found", "--run-dir", "runs"]
    return forge(*words, "model.pretrained=small", *TRAIN, *more)


@pytest.mark.slow
def test_from_files_to_lists(forge, tmp_path, store):
    table = str(prepare(forge, tmp_path))
    train(forge, "max_steps=4", "validation.every=2")
    model = store.open("found", kind="model").manifest
    queries = store.open("shop-synthetic", kind="queries").manifest
    assert queries.key in model.parents
    assert "task_text.json" in model.files
    for file in (tmp_path / "small").iterdir():
        file.unlink()  # the model has all that it needs
    rows = forge("gr", "eval", "found", "--queries", "shop-synthetic", "--sids", table, "ks=[5,10]",
                 "bootstrap=20")  # fmt: skip
    names = [row["model"].split("-")[-1] for row in rows]
    assert [name.partition(" ")[2] or name for name in names][1:] == [
        "without query", "bm25", "popularity", "item_knn",
    ]  # fmt: skip
    assert len({row["users"] for row in rows}) == 1
    assert rows[0]["invalid_rate"] == 0
    report = forge("gr", "recommend", "found", "--queries", "shop-synthetic", "--sids", table,
                   "--out", "lists", "top_k=5")  # fmt: skip
    lists = pads.dataset(tmp_path / "lists" / "lists", format="parquet").to_table()
    assert report["users"] == len(lists) == queries.rows["test"]
    asked = pads.dataset(store.open("shop-synthetic").files("sequences/test/")).to_table()
    assert sorted(lists["query"].to_pylist()) == sorted(asked["query"].to_pylist())
    assert None not in lists["user_id"].to_pylist()
    with pytest.raises(ConfigError, match="append_targets"):
        forge("gr", "recommend", "found", "--queries", "shop-synthetic", "--sids", table,
              "append_targets=true", "--out", "other")  # fmt: skip
