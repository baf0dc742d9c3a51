"""SIDs in columns of the items become a table that is read back as it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.sid import app
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError, DataError
from forge_ray.sid.columns import code_columns, table_of_columns, write_npz
from forge_ray.sid.storage import load_table
from forge_ray.sid.table import SidTable
from tests.evaluate.datasets import write_dataset

CODES = np.array([[0, 5, 8191], [3, 0, 1], [2, 2, 2]])


def dataset_with(store: ArtifactStore, **columns: Sequence[object]) -> Dataset:
    sequences = Ragged.from_lists([[0, 1, 2]])
    ids = np.array(["x", "y", "z"])
    return write_dataset(store, sequences, item_ids=ids, columns=columns)


def published(store: ArtifactStore) -> Dataset:
    levels = {f"codebook_lv{level + 1}": CODES[:, level] for level in (2, 0, 1)}
    return dataset_with(store, title=["a", "b", "c"], **levels)


def test_columns_go_in_the_order_of_levels(store: ArtifactStore, tmp_path: Path) -> None:
    dataset = published(store)
    columns = code_columns(dataset)
    assert columns == ["codebook_lv1", "codebook_lv2", "codebook_lv3"]
    table = table_of_columns(dataset, columns)
    np.testing.assert_array_equal(table.codes, CODES)
    assert table.codebook_sizes == (8192, 8192, 8192)
    sized = table_of_columns(dataset, columns, (4, 6, 8192))
    write_npz(tmp_path / "deep/sids.npz", sized, dataset)
    back = SidTable.from_npz(tmp_path / "deep/sids.npz", np.array(["z", "x", "y"]))
    np.testing.assert_array_equal(back.codes, CODES[[2, 0, 1]])
    assert back.codebook_sizes == (4, 6, 8192)


def test_the_version_of_al_gr_goes_with_a_table(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, path = published(store), tmp_path / "sids.npz"
    table = table_of_columns(dataset, code_columns(dataset))
    for written, read in (("", "final"), ("final", "final"), ("final", "")):
        monkeypatch.setattr(Dataset, "al_gr_version", written)
        write_npz(path, table, dataset)
        with np.load(path) as arrays:
            assert ("al_gr_version" in arrays) == bool(written)
        monkeypatch.setattr(Dataset, "al_gr_version", read)
        assert load_table(path, dataset).codes.tolist() == CODES.tolist()
    monkeypatch.setattr(Dataset, "al_gr_version", "base")
    with pytest.raises(DataError, match=r"must be of AL-GR's version base as .*, got final"):
        load_table(path, dataset)


def test_text_of_whole_numbers_will_do(store: ArtifactStore) -> None:
    dataset = dataset_with(store, lv1=["1", "2", "3"], lv2=[4.0, 5.0, 6.0])
    np.testing.assert_array_equal(
        table_of_columns(dataset, ["lv1", "lv2"]).codes, [[1, 4], [2, 5], [3, 6]]
    )


@pytest.mark.parametrize(
    ("columns", "chosen", "message"),
    [
        ({"title": ["a", "b", "c"]}, None, r"must have one column of codes per level .* --column"),
        ({"a_lv1": [1, 2, 3], "b_lv1": [1, 2, 3]}, None, "must have one column of codes per level"),
        ({"lv1": [1, 2, 3], "lv3": [1, 2, 3]}, None, "must have one column of codes per level"),
        ({"lv1": [[1], [2], [3]]}, None, "must hold whole numbers"),
        ({"lv1": [1, 2, 2**62]}, None, r"must be at most 2\^32"),
        ({"lv1": [1, 2, 3]}, ["lv1", "lv2"], r"got no \['lv2'\] among"),
        ({"lv1": [1, None, 3]}, None, r"got none of 'y' \(1 such items\).*items.required=\[lv1\]"),
        ({"lv1": ["1", "two", "3"]}, None, r"column lv1 .* must hold whole numbers, got .*two"),
        ({"lv1": [1, -2, 3]}, None, r"must lie in 0\.\.3, got -2"),
    ],
)
def test_what_is_no_sid_is_refused(
    store: ArtifactStore,
    columns: dict[str, Sequence[object]],
    chosen: list[str] | None,
    message: str,
) -> None:
    dataset = dataset_with(store, **columns)
    with pytest.raises(DataError, match=message):
        table_of_columns(dataset, chosen or code_columns(dataset))


def run(store: ArtifactStore, *words: str) -> object:
    result = CliRunner().invoke(app, ["import", *words, "--store", store.uri, "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def test_the_command_writes_what_other_commands_take(store: ArtifactStore, tmp_path: Path) -> None:
    dataset = published(store)
    output = str(tmp_path / "forge.npz")
    facts = run(store, dataset.key, output)
    assert facts == {
        "columns": ["codebook_lv1", "codebook_lv2", "codebook_lv3"],
        "items": 3,
        "codebook_sizes": "8192x8192x8192",
        "uniqueness": 1.0,
        "path": output,
    }
    np.testing.assert_array_equal(SidTable.from_npz(output, dataset.item_ids()).codes, CODES)
    with pytest.raises(ConfigError, match="--size must be given once per level"):
        run(store, dataset.key, output, "--size", "8192")
    with pytest.raises(ConfigError, match=r"that ends in \.npz"):
        run(store, dataset.key, str(tmp_path / "forge.csv"))
    with pytest.raises(ConfigError, match="output must be a local path"):
        run(store, dataset.key, "s3://bucket/forge.npz")


def test_a_file_with_one_size_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    np.savez(path, codes=CODES, codebook_sizes=8192)
    with pytest.raises(DataError, match="codebook_sizes must be one number per level, got 8192"):
        SidTable.from_npz(path)
