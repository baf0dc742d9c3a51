"""Recommendation lists: content, identity and resuming."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.everyone import plan_everyone
from forge_ray.data.parts import plan_parts, read_part
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError, DataError, TrainingError
from forge_ray.gr import recommend as module
from forge_ray.gr.beam import default_widths
from forge_ray.gr.buckets import ItemBuckets
from forge_ray.gr.decoding import SidDecoder
from forge_ray.gr.recommend import RecommendConfig, recommend
from forge_ray.sid.table import SidTable
from tests.data.split_datasets import random_log, split_dataset, temporal_cut
from tests.gr.datasets import tiny_dataset
from tests.gr.generators import HashGenerator
from tests.gr.sources import HashSource


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return tiny_dataset(store)


def config_of(**changes) -> RecommendConfig:
    given = {"split": "test", "top_k": 7, "rows_per_part": 20, "num_actors": 1, **changes}
    return RecommendConfig(**given)


def read(out: Path) -> list[dict]:
    table = pads.dataset(out / "lists", format="parquet").to_table()
    return sorted(table.to_pylist(), key=lambda row: row["user_index"])


def expected_lists(dataset: Dataset, histories: Ragged, k: int) -> list[list[int]]:
    """The same lists without parts, Ray or files."""
    loaded = HashSource().load("cpu")
    decoder = SidDecoder(loaded.generator, loaded.table, widths=(50, 50, 100), max_history=5)
    buckets = ItemBuckets.build(
        decoder.item_rank(), num_sids=decoder.index.num_sids, train_counts=dataset.train_counts()
    )
    decoded = decoder.decode(histories)
    lists = buckets.expand(decoded.sid_rank, decoded.scores, k=k, seen=histories)
    return [row[row >= 0].tolist() for row in lists.items]


def all_users(dataset: Dataset) -> tuple[Ragged, Ragged]:
    batches = list(dataset.sequence_batches("test"))
    histories = Ragged.concatenate([batch.items for batch in batches])
    return histories, Ragged.concatenate([batch.targets for batch in batches])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_lists_of_all_users_with_their_own_ids(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = recommend(HashSource(), dataset, config_of(), out=str(out))
    rows = read(out)
    histories, _ = all_users(dataset)
    assert [row["items"] for row in rows] == expected_lists(dataset, histories, 7)
    for row, history in zip(rows, histories, strict=True):
        assert row["user_id"] == f"user-{row['user_index']}"
        assert row["item_ids"] == [f"item-{item}" for item in row["items"]]
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert not set(row["items"]) & set(history.tolist())
    assert (report.users, report.parts, report.parts_resumed) == (90, 6, 0)
    assert report.invalid_rate == report.short_rate == 0
    assert report.users_per_s > 0
    assert json.loads((out / "summary.json").read_text())["users"] == 90


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_lists_for_some_users_are_those_of_all(dataset: Dataset, tmp_path: Path) -> None:
    recommend(HashSource(), dataset, config_of(), out=str(tmp_path / "all"))
    report = recommend(HashSource(), dataset, config_of(max_users=25), out=str(tmp_path / "some"))
    assert report.users == 25
    everyone = {row["user_index"]: row for row in read(tmp_path / "all")}
    assert all(row == everyone[row["user_index"]] for row in read(tmp_path / "some"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_by_default_every_user_has_a_list_after_all_events(
    dataset: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = config_of(split=None, num_actors=None)
    recommend(HashSource(), dataset, config, out=str(out))
    histories, targets = all_users(dataset)
    rows = read(out)
    expected = expected_lists(dataset, histories.followed_by(targets), 7)
    assert [row["items"] for row in rows] == expected
    assert [row["user_id"] for row in rows] == [f"user-{user}" for user in range(90)]
    assert json.loads((out / "request.json").read_text())["config"]["split"] == "all"
    lost = sorted((out / "lists").iterdir())[1]
    lost.unlink()
    report = recommend(HashSource(), dataset, config_of(split="all"), out=str(out))
    assert (report.users, report.parts_resumed) == (90, 5)
    assert read(out) == rows


def test_users_without_an_event_have_no_list(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_run", _write_here)
    items, times = random_log()
    dataset = split_dataset(store, items, times, temporal_cut("each"), name="stage")
    config = config_of(split="all", rows_per_part=1, bucket_order="popularity")
    report = recommend(HashSource(), dataset, config, out=str(tmp_path))
    assert report.parts == 60
    assert 30 < report.users < 60
    rows = read(tmp_path)
    assert len(rows) == report.users == len({row["user_id"] for row in rows})
    assert all(row["user_id"] == f"user-{row['user_index']}" for row in rows)


def _write_here(job: module._Job, parts: list) -> None:
    writer = module._PartWriter(job)
    for part in parts:
        writer._write(part)


def test_a_part_without_events_is_a_file_without_rows(store: ArtifactStore, tmp_path: Path) -> None:
    items, times = random_log(num_users=9)
    late = Ragged(times.values + 100, times.offsets)
    dataset = split_dataset(store, items, late, temporal_cut("all"), name="late")
    (tmp_path / "lists").mkdir()
    job = module._Job(config_of(split="all"), HashSource(), dataset, str(tmp_path), None)
    module._PartWriter(job)._write(next(iter(plan_everyone(dataset, rows_per_part=9))))
    (file,) = (tmp_path / "lists").iterdir()
    full = _lists_of_test(tiny_dataset(store), tmp_path / "other")
    assert pq.read_table(file).num_rows == 0
    assert pq.read_schema(file) == pq.read_schema(full)


def _lists_of_test(dataset: Dataset, out: Path) -> Path:
    (out / "lists").mkdir(parents=True)
    job = module._Job(config_of(), HashSource(), dataset, str(out), None)
    module._PartWriter(job)._write(next(iter(plan_parts(dataset, "test", rows_per_part=9))))
    (file,) = (out / "lists").iterdir()
    return file


def test_a_request_without_all_is_what_it_was(dataset: Dataset, tmp_path: Path) -> None:
    """A folder that was begun before there was `all` goes on with its split named."""
    job = module._Job(config_of(), HashSource(), dataset, str(tmp_path), None)
    assert module._request(job) == {
        "model": "hash-model",
        "dataset": dataset.key,
        "config": {
            "split": "test",
            "append_targets": False,
            "top_k": 7,
            "widths": None,
            "exclude_seen": True,
            "bucket_order": "popularity",
            "space": "default",
            "rows_per_part": 20,
        },
    }


def test_the_split_follows_what_is_asked() -> None:
    assert config_of(split=None).completed(has_queries=False).split == "all"
    assert config_of(split=None).completed(has_queries=True).split == "test"
    assert config_of(split="train").completed(has_queries=False).split == "train"
    with pytest.raises(ConfigError, match=r"append_targets must be false for split=all"):
        config_of(split=None, append_targets=True).completed(has_queries=False)


def test_rows_of_a_query_set_are_no_everybody(dataset: Dataset) -> None:
    queries = SimpleNamespace(check_dataset=lambda dataset: None)
    with pytest.raises(ConfigError, match=r"split must be one of .* with --queries, got 'all'"):
        module._check_queries(queries, dataset, config_of(split="all"))


def test_the_pool_grows_with_the_cluster_up_to_the_parts() -> None:
    pools = [module._pool(config_of(num_actors=n), num_parts=6) for n in (None, 2, 9)]
    assert [(pool.min_size, pool.max_size) for pool in pools] == [(1, 6), (1, 2), (1, 6)]


def test_item_ids_may_be_more_than_a_string_array_holds(dataset: Dataset, tmp_path: Path) -> None:
    ids = module._item_ids(dataset)
    assert ids.type == pa.large_string()
    assert ids.to_pylist() == [f"item-{item}" for item in range(200)]
    schema = pq.read_schema(_lists_of_test(dataset, tmp_path))
    assert schema.field("item_ids").type == pa.list_(pa.string())


def test_seen_items_do_not_shorten_lists(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "default_widths", lambda *_, **__: (50, 50, 4))
    (tmp_path / "lists").mkdir()
    part = next(iter(plan_parts(dataset, "test", rows_per_part=1000)))
    lengths = {}
    for excludes in (True, False):
        config = config_of(exclude_seen=excludes)
        job = module._Job(config, HashSource(), dataset, str(tmp_path), None)
        module._PartWriter(job)._write(part)
        lengths[excludes] = {len(row["items"]) for row in read(tmp_path)}
    assert lengths[True] == {7}
    assert min(lengths[False]) < 7


def test_lists_are_full_where_the_last_level_does_not_branch() -> None:
    """A prefix of two codes owns one SID: beams at the last level are no more than before it."""
    sizes, num_items = (16, 16, 2), 200
    prefixes = np.random.default_rng(0).permutation(256)[:num_items]
    codes = np.column_stack([prefixes // 16, prefixes % 16, prefixes % 2])
    table = SidTable.from_codes(codes, sizes)
    rng = np.random.default_rng(1)
    histories = Ragged.from_lengths(
        np.concatenate([rng.permutation(num_items)[:size] for size in (0, 10, 90)]),
        np.array([0, 10, 90]),
    )
    decoder = SidDecoder(
        HashGenerator(sizes),
        table,
        widths=default_widths(3, max_k=50),
        max_history=5,
        fills=50,
    )
    decoded = decoder.decode(histories)
    buckets = ItemBuckets.build(
        decoder.item_rank(), num_sids=num_items, train_counts=np.zeros(num_items, np.int64)
    )
    lists = buckets.expand(decoded.sid_rank, decoded.scores, k=50, seen=histories)
    assert (lists.lengths == 50).all()


def test_widths_of_another_table_leave_the_folder_free(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="widths must be 3 integers"):
        recommend(HashSource(), dataset, config_of(widths=[50, 50]), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_killed_run_continues_with_the_missing_parts(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recommend(HashSource(), dataset, config_of(), out=str(out))
    before = read(out)
    files = sorted((out / "lists").iterdir())
    (out / "summary.json").unlink()
    for lost in files[::2]:
        lost.unlink()
    (out / "lists" / f".{files[0].name}.partial").write_bytes(b"half a file")
    kept = {path.name: path.stat().st_mtime_ns for path in files[1::2]}
    report = recommend(HashSource(), dataset, config_of(num_actors=2), out=str(out))
    assert report.parts_resumed == 3
    assert report.users == 90
    assert read(out) == before
    assert {name: (out / "lists" / name).stat().st_mtime_ns for name in kept} == kept
    assert sorted((out / "lists").iterdir()) == files


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_finished_run_repeats_nothing(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    first = recommend(HashSource(), dataset, config_of(), out=out)
    monkeypatch.setattr(module, "_PartWriter", None)
    second = recommend(HashSource(), dataset, config_of(), out=out)
    assert second == replace(first, parts_resumed=6, users_per_s=0.0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_appended_targets_are_known_history(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recommend(HashSource(), dataset, config_of(append_targets=True), out=str(out))
    histories, targets = all_users(dataset)
    longer = Ragged.from_lists(
        [np.concatenate([h, t]) for h, t in zip(histories, targets, strict=True)], np.int64
    )
    assert [row["items"] for row in read(out)] == expected_lists(dataset, longer, 7)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_only_listed_items_in_dense_order(dataset: Dataset, tmp_path: Path) -> None:
    allow = tmp_path / "allow.txt"
    allow.write_text("\n".join(f"item-{item}" for item in range(100)))
    deny = tmp_path / "deny.txt"
    deny.write_text("item-7\nitem-8")
    config = config_of(allow=str(allow), deny=str(deny), bucket_order="dense")
    recommend(HashSource(), dataset, config, out=str(tmp_path / "out"))
    rows = read(tmp_path / "out")
    shown = {item for row in rows for item in row["items"]}
    assert shown <= set(range(100)) - {7, 8}
    assert all(len(row["items"]) == 7 for row in rows)
    vectors = dataset.vectors()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    histories, _ = all_users(dataset)
    tied = 0
    for row, history in zip(rows, histories, strict=True):
        profile = vectors[history[-5:]].mean(axis=0)
        close = vectors[row["items"]] @ profile
        same = np.diff(row["scores"]) == 0
        assert (np.diff(close)[same] <= 1e-6).all()
        tied += int(same.sum())
    assert tied > 100
    deny.write_text("item-7")
    with pytest.raises(ConfigError, match="must describe this request, got another allowed"):
        recommend(HashSource(), dataset, config, out=str(tmp_path / "out"))


def test_dense_order_needs_vectors(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vectors\.space must be one of"):
        recommend(
            HashSource(),
            dataset,
            config_of(bucket_order="dense", space="absent"),
            out=str(tmp_path / "out"),
        )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_an_actors_error_arrives_as_itself(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="logits of level 1 must be finite"):
        recommend(HashSource(is_broken=True), dataset, config_of(), out=str(tmp_path / "out"))


def test_lists_of_another_model_are_not_mixed_in(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "request.json").write_text(json.dumps({"model": "other", "dataset": dataset.key}))
    with pytest.raises(ConfigError, match=r"request.json must describe this request, got another"):
        recommend(HashSource(), dataset, config_of(), out=str(out))


def test_user_ids_are_found_whatever_the_order(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = list(plan_parts(dataset, "test", rows_per_part=30))[1]
    batch = read_part(dataset, part)
    shuffled = replace(batch, user_index=batch.user_index[::-1].copy())
    opened: list[str] = []
    real = pads.dataset
    monkeypatch.setattr(
        module.pads, "dataset", lambda path, **kw: opened.append(path) or real(path, **kw)
    )
    assert module._user_ids(dataset, part, shuffled).to_pylist() == [
        f"user-{user}" for user in shuffled.user_index
    ]
    assert isinstance(module._user_ids(dataset, part, batch), pa.StringArray)
    assert {path.rsplit("/", 2)[-2:] == ["users", "part-1.parquet"] for path in opened} == {True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "tests"}, "split must be one of"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"split": "train", "append_targets": True}, "append_targets must be false"),
        ({"split": "all", "append_targets": True}, "reads all events as it is: leave it out"),
        ({"num_actors": 0}, "num_actors must be >= 1"),
        ({"cpus_per_actor": -1.0}, "cpus_per_actor must be > 0"),
        ({"widths": [5, 5, 5]}, "end in at least top_k=7"),
    ],
)
def test_bad_requests_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


_RUN = """
import sys
from forge_ray.artifacts import ArtifactStore
from forge_ray.data.schema import Dataset
from forge_ray.gr.recommend import RecommendConfig, recommend
from forge_ray.launch.connect import connect
from tests.gr.sources import HashSource

connect(address="local", num_cpus=1, dashboard=False)
dataset = Dataset.open(ArtifactStore(sys.argv[1]), sys.argv[2])
config = RecommendConfig(split="test", top_k=7, rows_per_part=1, num_actors=1)
recommend(HashSource(), dataset, config, out=sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.ray
def test_kill_dash_nine_and_the_same_call(
    dataset: Dataset, tmp_path: Path, ray_local: None
) -> None:
    out = tmp_path / "out"
    store = dataset.artifact.root.rsplit("/", 2)[0]
    driver = subprocess.Popen([sys.executable, "-c", _RUN, store, dataset.key, str(out)])
    while len(list((out / "lists").glob("part-*"))) < 5:
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    time.sleep(5)  # its Ray notices, and the actor ends
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "lists").glob("part-*")}
    assert 5 <= len(kept) < 90
    config = config_of(rows_per_part=1)
    report = recommend(HashSource(), dataset, config, out=str(out))
    assert report.parts_resumed == len(kept)
    assert {name: (out / "lists" / name).stat().st_mtime_ns for name in kept} == kept
    histories, _ = all_users(dataset)
    assert [row["items"] for row in read(out)] == expected_lists(dataset, histories, 7)
