"""A dataset from imported AL-GR files: sequences are the log, item-SIDs the catalogue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.al_gr.importing import AlGrImportConfig, import_al_gr
from forge_ray.data.prepare import PrepareConfig, prepare
from forge_ray.data.sources import ItemsConfig
from forge_ray.errors import DataError
from tests.data.al_gr import files

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
    assert dataset.artifact.manifest.metrics["al_gr_version"] == "final"
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
