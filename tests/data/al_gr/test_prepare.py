"""A dataset from imported AL-GR files: sequences are the log, item-SIDs the catalogue."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.al_gr.importing import AlGrImportConfig, import_al_gr
from forge_ray.data.chain import stage_chain
from forge_ray.data.prepare import PrepareConfig, prepare
from forge_ray.data.schema import Dataset, Split
from forge_ray.data.sources import ItemsConfig, VectorsConfig, resolve
from forge_ray.data.splits import LeaveOneOutConfig, PublishedConfig, TemporalConfig
from forge_ray.data.validate import validate_dataset
from forge_ray.errors import ConfigError, DataError
from forge_ray.sid.al_gr import AlGrExportConfig, export_dataset
from tests.data.al_gr import files
from tests.data.test_everyone import everyone_in

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

ITEMS = [f"i{number}" for number in range(12)]


def write_sequences(folder: Path) -> list[list[str]]:
    """Histories newest first, as published; returns what each row holds, oldest first."""
    rng = np.random.default_rng(0)
    whole = [rng.permutation(ITEMS)[: rng.integers(4, 9)].tolist() for _ in range(40)]
    rows = [[";".join(row[-2::-1]), row[-1]] for row in whole]
    header = ["user_history", "target_item"]
    files.write_rows(folder / "origin/a.csv", [header, *rows[:25]])
    files.write_rows(folder / "origin/b.csv", [header, *rows[25:]])
    return whole


def imported(tmp_path: Path) -> Path:
    config = {"version": "final", "source": str(tmp_path / "raw"), "output": str(tmp_path / "in")}
    import_al_gr(AlGrImportConfig(**config))
    return tmp_path / "in"


def test_an_import_is_prepared_with_its_items_and_vectors(tmp_path: Path) -> None:
    whole = write_sequences(tmp_path / "raw")
    rng = np.random.default_rng(1)
    vectors = {name: rng.standard_normal(8).astype(np.float32) for name in ITEMS}
    sids = [[name, "1", "2", str(number)] for number, name in enumerate(ITEMS)]
    levels = ["codebook_lv1", "codebook_lv2", "codebook_lv3"]
    files.write_rows(tmp_path / "raw/sid.csv", [["item_id", *levels], *sids])
    embedded = [[name, files.feature(vector)] for name, vector in vectors.items()]
    files.write_rows(tmp_path / "raw/emb.csv", [["item_id", "feature"], *embedded])
    store = ArtifactStore(tmp_path / "store")

    (dataset,) = prepare(PrepareConfig(source=str(imported(tmp_path))), store)

    assert (dataset.num_items, dataset.rows["users"]) == (len(ITEMS), len(whole))
    names = dataset.items(["item_id"])["item_id"].to_pylist()
    found = sorted(
        [names[item] for item in [*batch.items.row(row), *batch.targets.row(row)]]
        for batch in dataset.sequence_batches("test")
        for row in range(len(batch.user_index))
    )
    assert found == sorted(whole)
    assert dataset.items(["codebook_lv3"])["codebook_lv3"].to_pylist() == [
        ITEMS.index(name) for name in names
    ]
    np.testing.assert_array_equal(dataset.vectors(), np.stack([vectors[name] for name in names]))


def test_the_items_of_the_sequences_will_do(tmp_path: Path) -> None:
    whole = write_sequences(tmp_path / "raw")
    (dataset,) = prepare(
        PrepareConfig(source=str(imported(tmp_path))), ArtifactStore(tmp_path / "store")
    )
    assert dataset.rows["interactions"] == sum(len(row) for row in whole)


def test_the_version_stays_and_two_do_not_mix(tmp_path: Path) -> None:
    write_sequences(tmp_path / "raw")
    final, store = imported(tmp_path), ArtifactStore(tmp_path / "store")
    (dataset,) = prepare(PrepareConfig(source=str(final)), store)
    assert dataset.al_gr_version == "final"
    export_dataset(dataset, None, str(tmp_path / "out"), AlGrExportConfig(parts=["sequences"]))
    assert json.loads((tmp_path / "out/_export.json").read_text())["al_gr_version"] == "final"
    sids = [[name, "1", "2", "3"] for name in ITEMS]
    levels = ["codebook_lv1", "codebook_lv2", "codebook_lv3"]
    files.write_rows(tmp_path / "sids/sid.csv", [["item_id", *levels], *sids])
    base = {"version": "base", "source": str(tmp_path / "sids"), "output": str(tmp_path / "base")}
    import_al_gr(AlGrImportConfig(**base))
    items = ItemsConfig(path=str(tmp_path / "base/items"))
    with pytest.raises(DataError, match="inputs must be of one version of AL-GR"):
        prepare(PrepareConfig(source=str(final), items=items), store)


def test_rows_of_sids_are_no_log(tmp_path: Path) -> None:
    rows = files.gr_rows(np.random.default_rng(0), 5)
    files.write_rows(tmp_path / "raw/g.csv", [["system", "user", "answer"], *rows])
    with pytest.raises(DataError, match="Origin-Sequence-Data"):
        prepare(PrepareConfig(source=str(imported(tmp_path))), ArtifactStore(tmp_path / "store"))


def write_stages(folder: Path, stages: int = 3) -> dict[tuple[int, str], list[list[list[str]]]]:
    """Sequences as AL-GR-Tiny has them; returns [history, targets] of each row, oldest first."""
    rng = np.random.default_rng(2)
    written = {}
    for stage in range(1, stages + 1):
        for part, name in (("train", f"s{stage}_tiny.csv"), ("test", f"s{stage}_tiny_test.csv")):
            found = []
            for _ in range(30 if part == "train" else 20):
                whole = rng.permutation(ITEMS).tolist()
                size, targets = rng.integers(1, 6), 1 if part == "train" else rng.integers(1, 4)
                found.append([whole[:size], whole[size : size + targets]])
            rows = [[";".join(history[::-1]), ";".join(targets)] for history, targets in found]
            header = ["user_history", "target_item"]
            files.write_rows(folder / "origin_behavior" / name, [header, *rows])
            written[stage, part] = found
    return written


def rows_in(dataset: Dataset, split: Split) -> list[list[list[str]]]:
    names = np.array(dataset.item_ids())
    return [
        [names[batch.items.row(row)].tolist()]
        + ([] if batch.targets is None else [names[batch.targets.row(row)].tolist()])
        for batch in dataset.sequence_batches(split)
        for row in range(len(batch))
    ]


def test_published_stages_stay_what_they_are(tmp_path: Path) -> None:
    written = write_stages(tmp_path / "raw")
    store = ArtifactStore(tmp_path / "store")
    config = PrepareConfig(source=str(imported(tmp_path)), split=PublishedConfig())

    stages = prepare(config, store)

    assert [one.name for one in stages] == ["in-s1", "in-s2", "in-s3"]
    assert [one.key for one in stage_chain(store, stages[1].key)] == [one.key for one in stages]
    for number, dataset in enumerate(stages, start=1):
        train = [[history + targets] for history, targets in written[number, "train"]]
        assert sorted(rows_in(dataset, "train")) == sorted(train)
        held_out = [*rows_in(dataset, "validation"), *rows_in(dataset, "test")]
        assert sorted(held_out) == sorted(written[number, "test"])
        # Rows are users: each is there once, and none of another stage's.
        names = np.array(dataset.item_ids())
        everyone = [names[items].tolist() for items in everyone_in(dataset).values()]
        every = written[number, "train"] + written[number, "test"]
        assert sorted(everyone) == sorted(history + targets for history, targets in every)
        assert dataset.has_items_of(stages[0])
        assert validate_dataset(dataset) == []
    # Another share is another dataset of the same log; the same settings build nothing anew.
    assert [one.key for one in prepare(config, store)] == [one.key for one in stages]
    fewer = replace(config, split=PublishedConfig(validation_share=0.2))
    assert prepare(fewer, store)[0].key != stages[0].key
    # Nor do stages told by other patterns stand in one chain with these.
    other = replace(config, split=PublishedConfig(stage_pattern=r"/s(\d)_tiny"))
    again = prepare(other, store)
    assert not {one.key for one in again} & {one.key for one in stages}
    assert [one.key for one in stage_chain(store, stages[0].key)] == [one.key for one in stages]
    assert len(list(store.manifests("log"))) == 1
    # Who wants all rows as one log gets them without the marks.
    (whole,) = prepare(replace(config, split=LeaveOneOutConfig()), store)
    times = [
        pq.read_table(path, filesystem=whole.filesystem)["timestamps"].combine_chunks().flatten()
        for path in whole.sequence_files("train")
    ]
    assert max(pc.max(one).as_py() for one in times) < len(ITEMS)


def write_tiny(folder: Path) -> list[list[list[str]]]:
    """What AL-GR-Tiny has, with a row of Item-EMB malformed, one of no item and codes empty.

    Returns the test rows.
    """
    rng = np.random.default_rng(3)
    written = write_stages(folder, stages=1)
    levels = ["codebook_lv1", "codebook_lv2", "codebook_lv3"]
    sids = [[name, "1", "2", "" if name == ITEMS[10] else "3"] for name in ITEMS]
    files.write_rows(folder / "item_info/sid_final.csv", [["item_id", *levels], *sids])
    vectors = rng.standard_normal((len(ITEMS) + 1, 8)).astype(np.float32)
    short = [vector[: 3 if place == 2 else 8] for place, vector in enumerate(vectors)]
    embedded = [
        [name, files.feature(vector)] for name, vector in zip([*ITEMS, "other"], short, strict=True)
    ]
    files.write_rows(folder / "item_feature/final_feature.csv", [["item_id", "feature"], *embedded])
    numbers = np.arange(len(ITEMS))
    halves = vectors[: len(ITEMS)].astype(np.float16)
    np.savez(folder / "item_feature/reconstruct_data_mask.npz", ids=numbers, embeds=halves)
    return written[1, "test"]


def test_a_whole_import_is_prepared_less_the_vectors_that_name_no_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held_out = write_tiny(tmp_path / "raw")
    source, store = str(imported(tmp_path)), ArtifactStore(tmp_path / "store")
    config = PrepareConfig(source=source, split=PublishedConfig())
    with pytest.raises(DataError, match="add unknown_vector to `skip`"):
        prepare(config, store)
    with pytest.raises(DataError, match="add missing_vector to `skip`"):
        prepare(replace(config, skip=["unknown_vector"]), store)

    caplog.handler.setLevel(logging.NOTSET)  # Ray's quieting reaches pytest's handler

    documented = replace(
        config,
        skip=["unknown_vector", "missing_vector", "missing_attribute"],
        items=ItemsConfig(required=["codebook_lv1", "codebook_lv2", "codebook_lv3"]),
    )
    (dataset,) = prepare(documented, store)

    assert "left out vector spaces ['reconstruct_data_mask']" in caplog.text
    (Path(source) / "vectors/mine").mkdir()
    assert list(resolve(config).vectors) == ["default", "mine"]  # put beside the imported ones
    assert dataset.spaces == ("default",)
    assert dataset.item_ids().tolist() == sorted({*ITEMS} - {ITEMS[2], ITEMS[10]})
    assert dataset.rows["skipped_items_without_vector"] == 1
    assert dataset.rows["skipped_unknown_vector"] == 1
    assert dataset.rows["skipped_missing_attribute"] == 1
    # Held-out rows that lose something with the two items are counted, each once.
    gone = {ITEMS[2], ITEMS[10]}
    left = [[[one for one in part if one not in gone] for part in row] for row in held_out]
    whole = [row for row in left if all(row)]
    fewer = sum(
        all(now) and len(now[1]) < len(before[1])
        for now, before in zip(left, held_out, strict=True)
    )
    assert dataset.rows["test_users"] + dataset.rows["validation_users"] == len(whole)
    causes = {name: count for name, count in dataset.rows.items() if name.startswith("held_out")}
    assert causes.pop("held_out_fewer_targets") == fewer > 0
    assert causes.pop("held_out_skipped_targets") == sum(not row[1] for row in left)
    assert causes.pop("held_out_skipped_history") == sum(
        not row[0] and bool(row[1]) for row in left
    )
    assert causes == {"held_out_without_history": 0, "held_out_without_targets": 0}
    # Taken by force, they have no vector of any item; the message says so at once.
    numbered = {"default": VectorsConfig(path=f"{source}/vectors/reconstruct_data_mask")}
    forced = replace(config, vectors=numbered, skip=["unknown_vector", "missing_vector"])
    with pytest.raises(DataError, match=r"vectors\.default must hold a usable vector of some item"):
        prepare(forced, store)


def test_an_interrupted_import_is_not_prepared(tmp_path: Path) -> None:
    write_stages(tmp_path / "raw", stages=1)
    source, store = imported(tmp_path), ArtifactStore(tmp_path / "store")
    record = source / "_files/00001.json"
    record.write_text(record.read_text().replace('"is_done": true', '"is_done": false'))
    for split in (PublishedConfig(), LeaveOneOutConfig()):
        with pytest.raises(DataError, match=r"complete import, got 1 unfinished .*s1_tiny_test"):
            prepare(PrepareConfig(source=str(source), split=split), store)


def test_names_without_stages_are_refused_before_the_log_is_built(tmp_path: Path) -> None:
    write_sequences(tmp_path / "raw")
    store = ArtifactStore(tmp_path / "store")
    config = PrepareConfig(source=str(imported(tmp_path)), split=PublishedConfig())
    with pytest.raises(DataError, match=r"split\.stage_pattern must find the stage"):
        prepare(config, store)
    assert not list(store.manifests())


def test_splits_that_do_not_fit_the_layout_are_refused(tmp_path: Path) -> None:
    write_stages(tmp_path / "raw", stages=1)
    store = ArtifactStore(tmp_path / "store")
    source = str(imported(tmp_path))
    with pytest.raises(ConfigError, match=r"split\.kind must be published or leave_one_out"):
        prepare(PrepareConfig(source=source, split=TemporalConfig()), store)
    log = tmp_path / "log/interactions.csv"
    files.write_rows(log, [["user_id", "item_id", "timestamp"], ["u", "i", "1"]])
    with pytest.raises(ConfigError, match=r"published must go with interactions\.layout=sequences"):
        prepare(PrepareConfig(source=str(log.parent), split=PublishedConfig()), store)
    assert not list(store.manifests())
