"""A SID table for a dataset: the one function that every command opens it with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.data.schema import KIND, Dataset
from forge_ray.errors import ArtifactError, ConfigError, DataError
from forge_ray.sid.storage import SIDS_KIND, fitted_dataset, load_table, table_source
from forge_ray.sid.table import SidTable
from tests.gr.chains import chain_dataset, grid_table


def stored(store: ArtifactStore, dataset: Dataset, name: str = "grid") -> str:
    """Key of the grid as a table that was fitted on a dataset."""

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        grid_table().save(writer)
        return ArtifactInfo(rows={"items": 120})

    parents = ["0" * 64, dataset.key]
    return store.build(SIDS_KIND, name, {}, parents=parents, produce=produce).key


def stage(store: ArtifactStore, chains: Dataset, number: int, log: str) -> Dataset:
    """A dataset that was cut from a log."""

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        return ArtifactInfo(rows=chains.rows)

    config = {"stage": number}
    name = f"chains-s{number}"
    return Dataset(store.build(KIND, name, config, parents=[log], produce=produce))


def test_a_stored_table_is_opened_for_its_dataset(store: ArtifactStore) -> None:
    dataset = chain_dataset(store)
    key = stored(store, dataset)
    source = table_source(store, key, dataset)
    table = load_table(source, dataset)
    assert table.key == key
    assert (table.codes == grid_table().codes).all()
    assert fitted_dataset(store, key).key == dataset.key


def test_a_table_of_another_stage_will_do_and_one_of_another_log_will_not(
    store: ArtifactStore,
) -> None:
    chains = chain_dataset(store)
    logs = ("a" * 64, "b" * 64)
    first, second = (stage(store, chains, number, logs[0]) for number in (1, 2))
    other = stage(store, chains, 1, logs[1])
    key = stored(store, first)
    assert load_table(table_source(store, key, second), second).key == key
    with pytest.raises(ConfigError, match=r"must code the items of chains-s1, got .* of chains-s1"):
        table_source(store, key, other)


def test_a_file_is_put_into_the_order_of_the_items(store: ArtifactStore, tmp_path: Path) -> None:
    dataset, path = chain_dataset(store), tmp_path / "t.npz"
    ids, codes = dataset.item_ids(), grid_table().codes
    order = np.random.default_rng(0).permutation(len(ids))
    np.savez(path, codes=codes[order], item_id=ids.astype(str)[order])
    source = table_source(store, str(path), dataset)
    assert source == path
    found: SidTable = load_table(source, dataset)
    assert (found.codes == codes).all()
    np.savez(path, codes=codes[:5], item_id=ids.astype(str)[:5])
    with pytest.raises(DataError, match="must hold exactly the dataset's 120 items"):
        load_table(source, dataset)


def test_another_kind_of_artifact_is_no_table(store: ArtifactStore) -> None:
    dataset = chain_dataset(store)
    with pytest.raises(ArtifactError, match="must be an artifact of kind 'sids'"):
        table_source(store, dataset.artifact.uri, dataset)
