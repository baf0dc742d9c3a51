"""Every kind of bad input gets an error that names file, row or column, and skipping counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.log import build_log
from forge_ray.data.prepare import PrepareConfig, prepare
from forge_ray.data.schema import Dataset
from forge_ray.data.sources import InteractionsConfig, ItemsConfig, SourcesConfig, resolve
from forge_ray.data.validate import validate
from forge_ray.errors import ConfigError, DataError
from tests.data.raw import EVENTS, ITEMS, write_events, write_items, write_raw, write_vectors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "raw")


def run(raw: Path, *skip: str, **options: object) -> Dataset:
    config = PrepareConfig(source=str(raw), skip=list(skip), num_shards=2, **options)
    return prepare(config, ArtifactStore(raw.parent / "store"))[0]


def vectors_parquet(raw: Path, column: pa.Array, ids: str = "abcd") -> None:
    (raw / "vectors.npz").unlink()
    (raw / "vectors").mkdir()
    table = pa.table({"item_id": list(ids), "embedding": column})
    pq.write_table(table, raw / "vectors" / "part-0.parquet")


def missing_column(raw: Path) -> None:
    write_events(raw, EVENTS, header="user_id,product,timestamp")


def missing_vector_array(raw: Path) -> None:
    np.savez(raw / "vectors.npz", item_id=np.array(list("abcd")), emb=np.zeros((4, 2)))


def wrong_dtype(raw: Path) -> None:
    (raw / "interactions.csv").unlink()
    table = pa.table({"user_id": [1.5], "item_id": ["a"], "timestamp": [1]})
    pq.write_table(table, raw / "interactions.parquet")


def wrong_timestamp_dtype(raw: Path) -> None:
    (raw / "interactions.csv").unlink()
    table = pa.table({"user_id": ["u"], "item_id": ["a"], "timestamp": [[1]]})
    pq.write_table(table, raw / "interactions.parquet")


def wrong_vector_dtype(raw: Path) -> None:
    vectors_parquet(raw, pa.array(["0.1 0.2"] * 4))


def text_timestamp(raw: Path) -> None:
    write_events(raw, [*EVENTS, ("dan", "a", "yesterday")])


def null_vector(raw: Path) -> None:
    vectors_parquet(raw, pa.array([[1.0, 2.0], None, [1.0, 2.0], [1.0, 2.0]]))


def nan_vector(raw: Path) -> None:
    write_vectors(raw, list("abcd"), [[1, 2], [1, 2], [np.nan, 2], [1, 2]])


def ragged_vectors(raw: Path) -> None:
    vectors_parquet(raw, pa.array([[1.0, 2.0], [1.0], [1.0, 2.0], [1.0, 2.0]]))


def unknown_vector(raw: Path) -> None:
    write_vectors(raw, list("abcdz"), np.ones((5, 3)))


def missing_vector(raw: Path) -> None:
    write_vectors(raw, list("abd"), np.ones((3, 3)))


def double_vector(raw: Path) -> None:
    write_vectors(raw, list("abcdd"), np.ones((5, 3)))


def unknown_item(raw: Path) -> None:
    write_events(raw, [*EVENTS, ("cid", "zebra", 9)])


def duplicate_item(raw: Path) -> None:
    write_items(raw, [*ITEMS, {"item_id": "b", "title": "again"}])


def negative_timestamp(raw: Path) -> None:
    write_events(raw, [("ann", "a", -3), *EVENTS])


def unsorted_timestamp(raw: Path) -> None:
    write_events(raw, [*EVENTS, ("ann", "a", 4)])


def empty_user(raw: Path) -> None:
    write_events(raw, [*EVENTS, ("", "a", 4)])


def truncated_parquet(raw: Path) -> None:
    (raw / "interactions.csv").unlink()
    path = raw / "interactions.parquet"
    table = pa.table({"user_id": ["u"] * 999, "item_id": ["a"] * 999, "timestamp": range(999)})
    pq.write_table(table, path)
    path.write_bytes(path.read_bytes()[:-200])


def truncated_npz(raw: Path) -> None:
    path = raw / "vectors.npz"
    path.write_bytes(path.read_bytes()[:-200])


def malformed_csv(raw: Path) -> None:
    (raw / "interactions.csv").write_text("user_id,item_id,timestamp\nu,a,1\nu,a,1,9,9\n")


def no_shards(raw: Path) -> None:
    (raw / "interactions.csv").unlink()
    (raw / "interactions").mkdir()
    (raw / "interactions" / "_SUCCESS").touch()


def no_interactions(raw: Path) -> None:
    (raw / "interactions.csv").unlink()


def two_inputs(raw: Path) -> None:
    (raw / "interactions.jsonl").touch()


CASES: list[tuple[Callable[[Path], None], str]] = [
    (missing_column, r"interactions\.csv must have a column 'item_id', got .*product.*item_id to"),
    (missing_vector_array, r"vectors\.npz must have a column 'embedding', .*vectors\.default\.vec"),
    (wrong_dtype, r"interactions\.parquet: column user_id must hold text .* got type double"),
    (wrong_timestamp_dtype, r"column timestamp must hold whole numbers .* got type list"),
    (
        wrong_vector_dtype,
        r"part-0\.parquet: column vector must hold lists of numbers, got .*string",
    ),
    (text_timestamp, r"interactions\.csv row 9: timestamp must be a whole .* got 'yesterday'"),
    (null_vector, r"part-0\.parquet row 2: vector must not be null"),
    (nan_vector, r"vectors\.npz row 3: vector must hold finite numbers only, got \[nan"),
    (ragged_vectors, r"part-0\.parquet row 2: vector must have 2 numbers .* got 1"),
    (unknown_vector, r"vectors\.npz row 5: item_id must be in the catalogue, got 'z'"),
    (missing_vector, r"vectors\.npz .* must hold a vector of every item, got 0 of item 'c'"),
    (double_vector, r"vectors\.npz .* must hold one vector per item, got 2 of item 'd'"),
    (unknown_item, r"interactions\.csv row 9: item_id must be in the catalogue, got 'zebra'"),
    (duplicate_item, r"items\.jsonl row 5: item_id must be unique, got 'b', which row 3 of"),
    (negative_timestamp, r"interactions\.csv row 1: timestamp must be >= 0, got '-3'"),
    (unsorted_timestamp, r"csv row 9: timestamp must not fall .* got 4 after 40 for user 'ann'"),
    (empty_user, r"interactions\.csv row 9: user_id must not be empty, got None"),
    (truncated_parquet, r"interactions\.parquet must be a complete parquet file, got \d+ bytes"),
    (truncated_npz, r"vectors\.npz must be a complete npz file"),
    (malformed_csv, r"interactions\.csv must be a complete csv file, .*Expected 3 columns, got 5"),
    (no_shards, r"interactions\.path must hold csv/.* files, got none in .*/interactions"),
    (no_interactions, r"raw must hold interactions\.csv"),
    (two_inputs, r"must hold one input named interactions, got"),
]


@pytest.mark.parametrize(("damage", "message"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_names_the_place(raw: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(raw)
    with pytest.raises(DataError, match=message):
        run(raw)


SKIPS = [
    (text_timestamp, "invalid_timestamp", {"skipped_invalid_timestamp": 1}),
    (unknown_vector, "unknown_vector", {"skipped_unknown_vector": 1}),
    (unknown_item, "unknown_item", {"skipped_unknown_item": 1}),
    (duplicate_item, "duplicate_item", {"skipped_duplicate_item": 1}),
    (negative_timestamp, "negative_timestamp", {"skipped_negative_timestamp": 1}),
    (empty_user, "empty_user", {"skipped_empty_user": 1}),
]


@pytest.mark.parametrize(("damage", "cause", "counts"), SKIPS, ids=[case[1] for case in SKIPS])
def test_skips_on_request_and_counts(
    raw: Path, damage: Callable[[Path], None], cause: str, counts: dict[str, int]
) -> None:
    damage(raw)
    rows = run(raw, cause).rows
    assert {name: n for name, n in rows.items() if name.startswith("skipped_")} == counts
    assert (rows["items"], rows["users"], rows["interactions"]) == (4, 3, 8)


@pytest.mark.parametrize("damage", [null_vector, nan_vector, missing_vector])
def test_items_without_vector_leave_with_their_interactions(
    raw: Path, damage: Callable[[Path], None]
) -> None:
    damage(raw)
    dataset = run(raw, "missing_vector" if damage is missing_vector else "null_vector")
    gone = "b" if damage is null_vector else "c"
    assert dataset.item_ids().tolist() == sorted(set("abcd") - {gone})
    assert dataset.rows["skipped_items_without_vector"] == 1
    assert dataset.rows["skipped_interaction_of_skipped_item"] == 2
    assert dataset.vectors().shape[0] == 3


def test_items_must_have_what_is_required(raw: Path) -> None:
    codes = {"a": 1, "b": None, "c": 3, "d": 4}
    # An item listed again does not win by having what the first one lacks.
    rows = [{**row, "code": codes[row["item_id"]]} for row in ITEMS] + [{"item_id": "b", "code": 9}]
    write_items(raw, rows)
    required = ItemsConfig(required=["code"])
    with pytest.raises(DataError, match=r"items.jsonl row 3: code must have a value, got None"):
        run(raw, items=required)
    with pytest.raises(DataError, match=r"items.required must name columns of .*, got 'colour'"):
        run(raw, items=ItemsConfig(required=["colour"]))
    with pytest.raises(DataError, match=r"must name columns beside the id, got 'item_id'"):
        run(raw, items=ItemsConfig(required=["item_id"]))
    dataset = run(raw, "missing_attribute", "duplicate_item", items=required)
    assert dataset.item_ids().tolist() == ["a", "c", "d"]
    assert dataset.items(["code"])["code"].to_pylist() == [1, 3, 4]
    assert dataset.rows["skipped_missing_attribute"] == 1
    assert dataset.rows["skipped_interaction_of_skipped_item"] == 2
    assert dataset.vectors()[:, 0].tolist() == [0, 6, 9]
    # Both reasons to leave an item out, at once: too few events remain to hold any out.
    write_vectors(raw, list("abd"), [[0.0], [1.0], [3.0]])
    skip = ["missing_attribute", "duplicate_item", "missing_vector"]
    config = resolve(SourcesConfig(source=str(raw), skip=skip, items=required))
    log = build_log(config, ArtifactStore(raw.parent / "store"), name="both")
    assert log.manifest.rows["items"] == 2
    assert log.manifest.rows["skipped_interaction_of_skipped_item"] == 4


def test_validation_reports_what_is_required_and_not_what_follows(raw: Path) -> None:
    write_items(raw, [{**row, "code": None if row["item_id"] == "b" else 1} for row in ITEMS])
    config = SourcesConfig(source=str(raw), items=ItemsConfig(required=["code"]))
    assert [one.cause for one in validate(config)] == ["missing_attribute"]
    assert validate(replace(config, skip=["missing_attribute"])) == []


def test_there_is_no_requirement_without_items(raw: Path) -> None:
    (raw / "items.jsonl").unlink()
    with pytest.raises(DataError, match="must go with a catalogue"):
        run(raw, items=ItemsConfig(required=["code"]))


def test_items_that_all_lack_something_are_refused(raw: Path) -> None:
    write_items(raw, [{**row, "code": ""} for row in ITEMS])
    with pytest.raises(DataError, match=r"must list at least one usable item, got 4 that lack"):
        run(raw, "missing_attribute", items=ItemsConfig(required=["code"]))


def test_sorts_on_request_and_counts(raw: Path) -> None:
    unsorted_timestamp(raw)
    dataset = run(raw, interactions=InteractionsConfig(unsorted="sort"))
    assert dataset.rows["reordered_interactions"] == 1
    batches = list(dataset.sequence_batches("train"))
    lists = [batch.items.row(row).tolist() for batch in batches for row in range(len(batch))]
    rows = {len(items): items for items in lists}
    assert max(rows) == 3
    assert [0, 0, 1] in rows.values(), "the late row comes first, ties keep file order"


def test_unknown_cause_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"skip must name causes among .* got 'bad'"):
        PrepareConfig(skip=["bad"])
