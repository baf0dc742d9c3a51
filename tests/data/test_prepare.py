"""prepare end to end on small files and on real data."""

from __future__ import annotations

import csv
import json
import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.data import app
from forge_ray.config import load_config
from forge_ray.data.chain import TOGETHER, stage_chain
from forge_ray.data.cut import Stage
from forge_ray.data.prepare import (
    PrepareConfig,
    _default_name,
    _identity,
    open_or_prepare,
    prepare,
)
from forge_ray.data.schema import Dataset, SequenceBatch
from forge_ray.data.sources import InteractionsConfig, VectorsConfig
from forge_ray.data.splits import StageDays, Targets, TemporalConfig
from forge_ray.data.validate import validate_dataset
from tests.data.raw import write_events, write_raw

pytestmark = pytest.mark.ray


def histories(dataset: Dataset, split: str) -> dict[str, list[str]]:
    """User id → item ids of history and targets, read back through the handle."""
    ids = dataset.item_ids()
    users = dataset._table(dataset.artifact.files("users"), None)
    names = dict(zip(users["user_index"].to_pylist(), users["user_id"].to_pylist(), strict=True))
    found = {}
    for batch in dataset.sequence_batches(split):
        for row, user in enumerate(batch.user_index.tolist()):
            targets = [] if batch.targets is None else batch.targets.row(row)
            items = np.concatenate([batch.items.row(row), targets]).astype(int)
            found[names[user]] = ids[items].tolist()
    return found


def test_beauty(ray_local: None, shared_data: Path, store: ArtifactStore) -> None:
    folder = shared_data / "amazon-beauty"
    dataset = open_or_prepare(folder, store)
    assert (dataset.num_items, dataset.num_users) == (12_101, 22_363)
    assert dataset.rows["interactions"] == 198_502
    assert dataset.item_ids().tolist() == sorted(dataset.item_ids().tolist())
    truth = defaultdict(list)
    with (folder / "interactions.csv").open() as handle:
        for row in csv.DictReader(handle):
            truth[row["user_id"]].append(row["item_id"])
    assert histories(dataset, "train") == {u: s[:-2] for u, s in truth.items()}
    assert histories(dataset, "validation") == {u: s[:-1] for u, s in truth.items()}
    assert histories(dataset, "test") == truth
    archive = np.load(folder / "item_embeddings_minilm384.npz")
    order = np.argsort(archive["item_id"])
    np.testing.assert_array_equal(dataset.vectors(), archive["embedding"][order].astype(np.float32))
    counts = np.bincount(
        np.concatenate([batch.items.values for batch in dataset.sequence_batches("train")]),
        minlength=dataset.num_items,
    )
    np.testing.assert_array_equal(dataset.train_counts(), counts)
    assert open_or_prepare(folder, store).key == dataset.key


def test_the_first_users_are_a_sample_of_all(
    ray_local: None, tmp_path: Path, store: ArtifactStore
) -> None:
    # The later the id, the longer the history: the order of ids would show in any prefix.
    users = [(f"u{number:04d}", 3 + number // 50) for number in range(1000)]
    rows = [(user, f"i{at}", at) for user, length in users for at in range(length)]
    write_events(tmp_path, rows)
    dataset = open_or_prepare(tmp_path, store)
    everyone = [len(items) for items in histories(dataset, "test").values()]
    batches = list(dataset.sequence_batches("test", limit=200))
    lengths = np.concatenate([batch.items.lengths for batch in batches]) + 1
    assert len(lengths) == 200
    spread = np.std(everyone) / np.sqrt(len(lengths))
    assert abs(lengths.mean() - np.mean(everyone)) < 4 * spread


def test_command_and_stored_configuration_give_the_same_dataset(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_raw(tmp_path / "it's raw")
    (raw / "vectors.npz").rename(raw / "mini.384.npz")
    monkeypatch.chdir(tmp_path)
    config = PrepareConfig(
        source=raw.name,
        num_shards=2,
        vectors={"a.b": VectorsConfig(path=f"{raw.name}/mini.384.npz")},
    )
    store = ArtifactStore(tmp_path / "one")
    (dataset,) = prepare(config, store)
    (log,) = store.manifests("log")
    manifest = dataset.artifact.manifest
    assert log.command == manifest.command
    monkeypatch.chdir("/")
    words = shlex.split(manifest.command)
    assert words[:3] == ["forge-ray", "data", "prepare"]
    options = ["--store", str(tmp_path / "two"), "--json"]
    result = CliRunner().invoke(app, [*words[2:], *options], catch_exceptions=False)
    assert json.loads(result.stdout)[0]["dataset"] == manifest.ref
    stored = load_config(PrepareConfig, path=dataset.artifact.local("prepare.yaml"))
    assert prepare(stored, store)[0].key == dataset.key


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_lends_its_full_name_and_a_file_its_stem(tmp_path: Path, scheme: str) -> None:
    raw = write_raw(tmp_path / "beauty.v2")
    assert _default_name(PrepareConfig(source=f"{scheme}{raw}/")) == "beauty.v2"
    log = InteractionsConfig(path=f"{scheme}{raw}/interactions.csv")
    assert _default_name(PrepareConfig(interactions=log)) == "interactions"


def test_a_row_for_each_event_is_scattered_and_valid(
    ray_local: None, tmp_path: Path, store: ArtifactStore
) -> None:
    rows = [(f"u{user:02d}", f"i{at}", 86_400 * at) for user in range(40) for at in range(12)]
    write_events(tmp_path, rows)
    split = TemporalConfig(stage_days=6, test_days=6, targets="each")
    (dataset,) = prepare(PrepareConfig(source=str(tmp_path), split=split, num_shards=1), store)
    assert validate_dataset(dataset) == []
    (batch,) = dataset.sequence_batches("validation")
    users = dataset.rows["validation_users"]
    assert len(np.unique(batch.user_index)) == users
    assert len(batch) == 6 * users
    assert set(batch.items.lengths.tolist()) == set(range(6, 12))
    assert all(len(items) == int(dataset.item_ids()[one][1:]) for items, (one,) in _pairs(batch))
    assert len(np.unique(batch.user_index[:users])) > users / 3


def test_stages_name_those_of_their_own_call(
    ray_local: None, tmp_path: Path, store: ArtifactStore
) -> None:
    rows = [(f"u{user:02d}", f"i{at}", 86_400 * at) for user in range(20) for at in range(10)]
    write_events(tmp_path, rows)

    def cut(num_stages: int) -> list[Dataset]:
        split = TemporalConfig(num_stages=num_stages, stage_days=2, test_days=2, targets="last")
        return prepare(PrepareConfig(source=str(tmp_path), split=split, num_shards=1), store)

    def chain(dataset: Dataset) -> list[str]:
        return [one.key for one in stage_chain(store, dataset.key)]

    two = [one.key for one in cut(2)]
    four = cut(4)
    assert [one.key for one in four[2:]] == two
    assert chain(four[0]) == [one.key for one in four]
    assert chain(four[2]) == two
    assert TOGETHER not in open_or_prepare(tmp_path, store).artifact.manifest.metrics


def _pairs(batch: SequenceBatch) -> Iterator[tuple[Any, Any]]:
    assert batch.targets is not None
    return zip(batch.items, batch.targets, strict=True)


def test_kinds_of_targets_are_datasets_of_their_own() -> None:
    stage = Stage(1, StageDays(0, 7, 8))
    every, last, each = (
        PrepareConfig(split=TemporalConfig(targets=kind)) for kind in get_args(Targets)
    )
    assert _identity(every, stage) != _identity(last, stage)
    assert _identity(each, stage) != _identity(last, stage)
    more = PrepareConfig(split=TemporalConfig(num_stages=3))
    assert _identity(every, stage) == _identity(more, stage)
