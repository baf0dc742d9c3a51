"""Datasets and SID tables as AL-GR files, read back by plain Python and by our own import."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.data import app
from forge_ray.data.al_gr.importing import AlGrImportConfig, import_al_gr
from forge_ray.data.al_gr.sid_text import SidFormat
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError, DataError
from forge_ray.sid.al_gr import AlGrExportConfig, export_dataset
from forge_ray.sid.table import SidTable
from tests.evaluate.datasets import write_dataset

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
SIZES = (4, 5, 6)


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    rng = np.random.default_rng(0)
    rows = Ragged.from_lists([rng.integers(0, 300, size) for size in rng.integers(3, 9, 400)])
    ids = np.array([f"i{number:04d}" for number in range(300)])
    pairs = rng.integers(0, 300, (2, 500)).astype(np.int32)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    items = Ragged(rows.values.astype(np.int32), rows.offsets)
    return write_dataset(
        store,
        items,
        item_ids=ids,
        vectors=vectors,
        pairs=(pairs[0], pairs[1]),
        spaces={"other": vectors[:, ::-1].copy()},
    )


@pytest.fixture
def table(dataset: Dataset) -> SidTable:
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, dataset.num_items) for size in SIZES], axis=1)
    return SidTable.from_codes(codes, SIZES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def read(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for one in sorted(path.glob("*.csv")):
        with one.open(encoding="utf-8", newline="") as stream:
            rows += csv.DictReader(stream)
    return rows


def sequences(dataset: Dataset, split: Any) -> list[tuple[list[int], list[int]]]:
    found = []
    for batch in dataset.sequence_batches(split):
        targets = batch.targets if batch.targets is not None else [[]] * len(batch)
        found += [(list(h), list(t)) for h, t in zip(batch.items, targets, strict=True)]
    return found


def test_rows_hold_what_the_dataset_and_the_table_say(
    dataset: Dataset, table: SidTable, out: Path
) -> None:
    export_dataset(dataset, table, str(out), AlGrExportConfig(max_history=3))
    texts, ids = table.text(), dataset.item_ids()
    expected = [
        ("".join(texts[i] for i in history[max(0, end - 3) : end]), texts[history[end]])
        for history, _ in sequences(dataset, "train")
        for end in range(1, len(history))
    ]
    rows = read(out / "gr/train")
    found = [("".join(re.findall(r"C\d+", row["user"])), row["answer"]) for row in rows]
    assert found == expected
    assert {row["system"][-9:] for row in rows} == {"每个行为用三个词表示。"[-9:]}
    for split in ("validation", "test"):
        held = [
            ("".join(texts[i] for i in history[-3:]), ";".join(ids[t] for t in targets))
            for history, targets in sequences(dataset, split)
        ]
        rows = read(out / "gr" / split)
        assert [("".join(re.findall(r"C\d+", r["user"])), r["answer"]) for r in rows] == held
    origin = read(out / "sequences/test")
    assert [row["user_history"].split(";") for row in origin] == [
        [ids[i] for i in reversed(history[-3:])] for history, _ in sequences(dataset, "test")
    ]
    sids = read(out)
    assert [row["item_id"] for row in sids] == list(ids)
    codes = [[int(row[f"codebook_lv{level}"]) for level in (1, 2, 3)] for row in sids]
    assert codes == table.codes.tolist()


def test_vectors_and_pairs_are_the_datasets(dataset: Dataset, table: SidTable, out: Path) -> None:
    export_dataset(dataset, None, str(out), AlGrExportConfig())
    assert not (out / "gr").exists()
    vectors, ids = dataset.vectors(), dataset.item_ids().tolist()
    for row in read(out / "item_emb"):
        found = np.frombuffer(base64.b64decode(row["feature"]), "<f4")
        assert (found == vectors[ids.index(row["item_id"])]).all()
    with np.load(out / "reconstruct_data_mask.npz") as arrays:
        places = [ids.index(one) for one in arrays["ids"]]
        assert (arrays["embeds"] == vectors[places]).all()
    with np.load(out / "contrastive_data_mask.npz", allow_pickle=True) as arrays:
        rows = arrays["itemEncID"].item()
        assert sorted(rows) == sorted(ids)
        assert (arrays["embeds"][[rows[one] for one in ids]] == vectors).all()
        names = {row: name for name, row in rows.items()}
        pairs = dataset.pairs()
        assert [(ids.index(names[a]), ids.index(names[b])) for a, b in arrays["pairs"]] == list(
            zip(pairs.anchor.tolist(), pairs.positive.tolist(), strict=True)
        )


def test_our_import_takes_the_export_whole(
    dataset: Dataset, table: SidTable, tmp_path: Path
) -> None:
    written = export_dataset(dataset, table, str(tmp_path / "out"), AlGrExportConfig())
    config = AlGrImportConfig(
        source=str(tmp_path / "out"), output=str(tmp_path / "in"), version="final",
        codebook_sizes=list(SIZES), allow_pickle=True,
    )  # fmt: skip
    report = import_al_gr(config)
    assert report.skipped == {}
    assert report.ignored == []
    texts = sum(rows for name, rows in written.rows.items() if not name.endswith(".npz"))
    assert (
        sum(report.rows[part] for part in ("gr", "items", "sequences", "queries"))
        + (report.rows["vectors/default"])
        == texts
    )


def test_what_is_there_stays_and_another_table_is_refused(
    dataset: Dataset, table: SidTable, out: Path
) -> None:
    config = AlGrExportConfig(parts=["gr", "item_sid"], targets="last")
    first = export_dataset(dataset, table, str(out), config)
    num_rows = sum(len(history) > 1 for history, _ in sequences(dataset, "train"))
    assert len(read(out / "gr/train")) == num_rows
    again = export_dataset(dataset, table, str(out), config)
    assert again.rows == {}
    assert set(again.kept) == set(first.rows)
    other = SidTable.from_codes(np.zeros((dataset.num_items, 2), int), [8, 8])
    with pytest.raises(DataError, match="differs in 'sids'"):
        export_dataset(dataset, other, str(out), config)


def test_limits_are_checked_before_any_work(dataset: Dataset, out: Path) -> None:
    with pytest.raises(ConfigError, match="65536 tokens, got 81920"):
        SidFormat((8192,) * 10)
    with pytest.raises(ConfigError, match="level_stride must be >= the largest codebook"):
        SidFormat((8, 16), stride=8)
    with pytest.raises(ConfigError, match=r"SID table for 'gr', got none. Add --sids"):
        export_dataset(dataset, None, str(out), AlGrExportConfig(parts=["gr"]))


def test_only_rows_that_spell_sids_need_tokens(dataset: Dataset, out: Path) -> None:
    codes = np.zeros((dataset.num_items, 2), int)
    codes[:, 1] = 70_000 + np.arange(dataset.num_items)
    table = SidTable.from_codes(codes, (4, 80_000))
    written = export_dataset(
        dataset, table, str(out), AlGrExportConfig(parts=["item_sid", "sequences"])
    )
    assert written.rows["item_sid.csv"] == dataset.num_items
    assert [int(row["codebook_lv2"]) for row in read(out)] == codes[:, 1].tolist()
    with pytest.raises(ConfigError, match=r"65536 tokens, got 80004 .* leave gr out: parts="):
        export_dataset(dataset, table, str(out), AlGrExportConfig())


def test_the_command_takes_foreign_tables(
    store: ArtifactStore, dataset: Dataset, table: SidTable, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, codes=table.codes, item_id=dataset.item_ids().astype(str))
    arguments = ["export", dataset.key, str(tmp_path / "out"), "parts=[item_sid]", "--json"]
    arguments += ["--sids", str(foreign), "--store", store.uri]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == {"item_sid.csv": dataset.num_items}


OTHERS: dict[str, Any] = {
    "parts": ["gr"],
    "targets": "last",
    "max_history": 2,
    "level_stride": 64,
    "space": "other",
    "max_queries": 3,
    "system": "Say it in {levels}.",
    "before": "Before: ",
    "after": ". After?",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_field_changes_something(
    name: str, dataset: Dataset, table: SidTable, tmp_path: Path
) -> None:
    assert set(OTHERS) == {one.name for one in dataclasses.fields(AlGrExportConfig)}
    written = []
    for folder, config in (
        ("usual", AlGrExportConfig()),
        ("other", AlGrExportConfig(**{name: OTHERS[name]})),
    ):
        export_dataset(dataset, table, str(tmp_path / folder), config)
        found = sorted((tmp_path / folder).rglob("*"))
        files = [path for path in found if path.suffix in (".csv", ".npz", ".txt")]
        assert files
        written.append([(path.name, path.read_bytes()) for path in files])
    assert written[0] != written[1]


def test_ids_that_lists_would_tear_apart_are_refused(store: ArtifactStore, out: Path) -> None:
    rows = Ragged(np.arange(12, dtype=np.int32) % 3, np.array([0, 4, 8, 12]))
    dataset = write_dataset(store, rows, item_ids=np.array(["a;b", "c", "d"]))
    with pytest.raises(DataError, match="got 'a;b'"):
        export_dataset(dataset, None, str(out), AlGrExportConfig(parts=["sequences"]))
    assert not out.exists()
