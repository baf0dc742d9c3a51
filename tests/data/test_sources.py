"""Formats, conventional names, mapped columns, content keys, import, validate, describe."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.data import tasks
from forge_ray.data.convert import ImportConfig, import_data
from forge_ray.data.describe import describe
from forge_ray.data.prepare import PrepareConfig, prepare
from forge_ray.data.schema import Dataset
from forge_ray.data.sources import InteractionsConfig, ItemsConfig, SourcesConfig
from forge_ray.data.splits import TemporalConfig
from forge_ray.data.validate import validate, validate_dataset
from tests.data.raw import EVENTS, ITEMS, write_events, write_items, write_raw, write_vectors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "raw")


def run(raw: Path, store: ArtifactStore, **options: object) -> Dataset:
    return prepare(PrepareConfig(source=str(raw), num_shards=2, **options), store)[0]


def content(dataset: Dataset) -> dict[str, object]:
    """Everything that a later stage could see."""
    found: dict[str, object] = {"items": dataset.items(["item_id", "train_count"]).to_pydict()}
    for split in ("train", "validation", "test"):
        batches = list(dataset.sequence_batches(split))
        found[split] = [
            (b.user_index.tolist(), [r.tolist() for r in b.items], b.targets and b.targets.values)
            for b in batches
        ]
    found["vectors"] = dataset.vectors().tolist()
    pairs = dataset.pairs()
    found["pairs"] = sorted(zip(pairs.anchor, pairs.positive, pairs.weight, strict=True))
    return found


def test_small_data_set_by_hand(raw: Path, store: ArtifactStore) -> None:
    dataset = run(raw, store)
    assert dataset.item_ids().tolist() == list("abcd")
    assert dataset.train_counts().tolist() == [1, 2, 0, 1]
    assert dataset.items(["title"])["title"].to_pylist() == [f"title {x}" for x in "abcd"]
    assert dataset.vectors().tolist() == np.arange(12).reshape(4, 3).tolist()
    sample = dataset.sample_vectors(2, seed=1)
    np.testing.assert_array_equal(sample.vectors, dataset.vectors()[sample.indices])
    assert dataset.rows["train_users"] == 3
    assert dataset.rows["test_users"] == 2
    test = {tuple(r.tolist()) for b in dataset.sequence_batches("test") for r in b.items}
    assert test == {(0, 1, 2), (1, 2)}, "ties in time keep the order of the file"
    limited = list(dataset.sequence_batches("train", batch_rows=1, limit=2))
    assert [len(batch) for batch in limited] == [1, 1]
    pairs = dataset.pairs()
    assert sorted(zip(pairs.anchor, pairs.positive, strict=True)) == [(0, 1), (1, 0)]
    assert validate_dataset(dataset) == []


def test_formats_file_order_and_place_do_not_matter(raw: Path, store: ArtifactStore) -> None:
    dataset = run(raw, store)
    moved = raw.parent / "elsewhere"
    shutil.copytree(raw, moved)
    assert run(moved, store).key == dataset.key, "the key is that of the content"
    # Parquet shards with other column names, users spread over both files; numbers as item ids
    # stay text.
    table = pacsv.read_csv(raw / "interactions.csv").rename_columns(["who", "what", "when"])
    (moved / "interactions.csv").unlink()
    (moved / "interactions").mkdir()
    for number, part in enumerate([table.slice(0, 6), table.slice(6)]):
        pq.write_table(part, moved / "interactions" / f"part-{number}.parquet")
    write_items(moved, list(reversed(ITEMS)))
    names = InteractionsConfig(user_id="who", item_id="what", timestamp="when")
    other = run(moved, store, interactions=names)
    assert other.key != dataset.key
    assert str(content(other)) == str(content(dataset))


def test_import_writes_the_conventional_layout(raw: Path, store: ArtifactStore) -> None:
    output = raw.parent / "imported"
    write_events(raw, [*EVENTS, ("", "a", 3)])
    config = ImportConfig(source=str(raw), output=str(output), skip=["empty_user"])
    report = import_data(config)
    assert report.rows == {"interactions": 8, "items": 4, "vectors/default": 4}
    assert report.skipped == {"empty_user": 1}
    write_events(raw, EVENTS)
    assert str(content(run(output, store))) == str(content(run(raw, store)))
    with pytest.raises(ValueError, match="output must be a new or empty folder"):
        import_data(config)


def test_stored_configuration_runs_again(raw: Path, store: ArtifactStore) -> None:
    paths = [
        f"interactions.path={raw}/interactions.csv",
        f"items.path={raw}/items.jsonl",
        f"vectors.default.path={raw}/vectors.npz",
        f"vectors.second.path={raw}/vectors.npz",
        "num_shards=2",
        "name=mine",
    ]
    (dataset,) = prepare(load_config(PrepareConfig, overrides=paths), store)
    assert dataset.spaces == ("default", "second")
    (again,) = prepare(
        load_config(PrepareConfig, path=dataset.artifact.local("prepare.yaml")), store
    )
    assert (again.key, again.name) == (dataset.key, "mine")


@pytest.mark.slow
def test_the_exchange_for_many_shards_gives_the_same(
    raw: Path, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = run(raw, store)
    monkeypatch.setattr(tasks, "SMALL_EXCHANGE", 0)
    other = run(raw, ArtifactStore(tmp_path / "other"))
    assert other.artifact.manifest.files == dataset.artifact.manifest.files
    assert str(content(other)) == str(content(dataset))


def _parts(number: int) -> Iterator[pa.Table]:
    draw = np.random.default_rng(number)
    for rows in (0, 50):
        shard = pa.array(draw.integers(-1, 40, rows).astype(np.int32))
        yield pa.table({"shard": shard, "value": pa.array(draw.integers(0, 9, rows))})


def _summed(rows: pa.Table, *, more: int) -> pa.Table:
    (shard,) = set(rows["shard"].to_pylist())
    return pa.table({"shard": [shard], "sum": [sum(rows["value"].to_pylist()) + more]})


@pytest.mark.parametrize("shards", [1, 7, 100])
def test_the_exchange_brings_every_shard_together_once(shards: int) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    expected: dict[int, int] = {}
    for part in (part for number in range(5) for part in _parts(number)):
        for row in part.to_pylist():
            expected[row["shard"]] = expected.get(row["shard"], 10) + row["value"]
    dataset = tasks.exchange(tasks.for_each(range(5), _parts), _summed, shards=shards, more=10)
    found = tasks.results(dataset)
    assert len(found) == len(expected)
    assert dict(zip(found["shard"].to_pylist(), found["sum"].to_pylist(), strict=True)) == expected


def _threads(number: int) -> Iterator[pa.Table]:
    yield pa.table({"threads": [pa.cpu_count()], "assigned": [tasks.limit_threads()]})


def test_tasks_use_the_cpus_they_were_given() -> None:
    # Workers do not see the tests' modules.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    found = tasks.results(tasks.for_each(range(2), _threads))
    assert found["threads"].to_pylist() == found["assigned"].to_pylist() == [1, 1]


def test_catalogue_and_vectors_are_optional(raw: Path, store: ArtifactStore) -> None:
    (raw / "items.jsonl").unlink()
    (raw / "vectors.npz").unlink()
    dataset = run(raw, store)
    assert dataset.item_ids().tolist() == list("abcd")
    assert dataset.spaces == ()
    with pytest.raises(ValueError, match=r"vectors\.space must be one of \[\], got 'default'"):
        dataset.vectors()


def test_validate_lists_all_problems_at_once(raw: Path) -> None:
    assert validate(SourcesConfig(source=str(raw))) == []
    bad = [("", "a", 1), ("ann", "zebra", 50), ("ann", "a", -1), ("ann", "a", 2)]
    write_events(raw, [*EVENTS, *bad])
    write_items(raw, [*ITEMS, ITEMS[0], {"item_id": "e", "title": "no vector"}])
    write_vectors(raw, list("abcdy"), [[1, 1], [np.nan, 1], [1, 1], [1, 1], [1, 1]])
    config = SourcesConfig(source=str(raw))
    causes = {finding.cause: finding.rows for finding in validate(config)}
    assert causes == {
        "duplicate_item": 1,
        "empty_user": 1,
        "missing_vector": 1,
        "negative_timestamp": 1,
        "null_vector": 1,
        "unknown_item": 1,
        "unknown_vector": 1,
        "unsorted_timestamp": 1,
    }
    everything = [cause for cause in causes if cause != "unsorted_timestamp"]
    agreed = replace(config, skip=everything, interactions=InteractionsConfig(unsorted="sort"))
    assert validate(agreed) == []
    (raw / "interactions.csv").write_text("a,b\n1,2\n")
    (finding,) = validate(config)
    assert "must have a column 'user_id'" in finding.example


def test_describe(raw: Path, store: ArtifactStore) -> None:
    found = describe(run(raw, store))
    assert found.history_length["p100"] == 2
    assert found.history_length["p50"] == 1
    assert found.item_count["p100"] == 2
    assert found.cold_share == 0.25
    assert found.same_timestamp_share == 0
    assert (found.first_timestamp, found.last_timestamp) == (1, 20)
    assert {row["statistic"] for row in found.to_rows()} >= {"counts.users", "history_length.p50"}


def test_movielens_temporal_with_mapped_names(shared_data: Path, store: ArtifactStore) -> None:
    folder = shared_data / "ml-latest-small"
    config = PrepareConfig(
        name="movies",
        interactions=InteractionsConfig(
            path=str(folder / "ratings.csv"),
            user_id="userid",
            item_id="movieid",
            unsorted="sort",
        ),
        items=ItemsConfig(path=str(folder / "movies.csv"), item_id="movieId"),
        split=TemporalConfig(num_stages=2, stage_days=1500, test_days=300),
    )
    stages = prepare(config, store)
    assert [stage.name for stage in stages] == ["movies-s1", "movies-s2"]
    assert stages[0].item_ids().tolist() == stages[1].item_ids().tolist()
    assert stages[0].num_items == 9742
    assert stages[0].rows["reordered_interactions"] > 0
    ratings = pacsv.read_csv(folder / "ratings.csv")
    for stage in stages:
        days = stage.artifact.manifest.config["stage"]
        day = ratings["timestamp"].to_numpy() // 86_400
        inside = (day >= days["first"]) & (day < days["end"])
        assert stage.rows["train_interactions"] == inside.sum()
        assert int(stage.train_counts().sum()) == inside.sum()
        users = {
            s: {u for b in stage.sequence_batches(s) for u in b.user_index.tolist()}
            for s in ("train", "validation", "test")
        }
        assert not users["validation"] & users["test"]
        assert users["validation"] | users["test"] <= users["train"]
        assert validate_dataset(stage) == []


def test_rows_of_any_chunk_are_numbered_from_the_file_start(tmp_path: Path) -> None:
    rows = 70_000
    table = pa.table({"user_id": ["u"] * rows, "item_id": ["a"] * rows, "timestamp": range(rows)})
    broken = table.set_column(1, "item_id", pa.array(["a"] * (rows - 1) + [None]))
    pq.write_table(broken, tmp_path / "interactions.parquet")
    (finding,) = validate(SourcesConfig(source=str(tmp_path)))
    assert finding.cause == "empty_item"
    assert f"row {rows}: item_id must not be empty" in finding.example
