"""Extending a table: published items keep their codes whatever happens around them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import load_config
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset, vectors_schema
from forge_ray.errors import ConfigError, DataError
from forge_ray.sid.config import EncodeConfig, SidConfig
from forge_ray.sid.extend import extend_sids
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.resolvers import KINDS
from forge_ray.sid.storage import SidArtifact, open_sids
from tests.evaluate.datasets import write_dataset

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(10, 8))[np.arange(400) % 10] + 0.3 * RNG.normal(size=(400, 8))


def dataset(store: ArtifactStore, items: np.ndarray, name: str, dim: int = 8) -> Dataset:
    """The items of these numbers, in this order, with ids and vectors of their own."""
    users = np.random.default_rng(1).integers(0, len(items), (50, 4))
    ids = np.array([f"item-{number}" for number in items])
    return write_dataset(
        store,
        Ragged.from_lengths(users.reshape(-1), np.full(50, 4)),
        item_ids=ids,
        vectors=VECTORS[items, :dim],
        name=name,
    )


def fitted(store: ArtifactStore, *words: str, items: int = 250) -> SidArtifact:
    small = ["quantizer.levels=2", "quantizer.sizes=[8, 128]"]
    config = load_config(SidConfig, overrides=[*small, *words])
    return fit_sids(config, dataset(store, np.arange(items), "old"), store)


def extended(store: ArtifactStore, sids: SidArtifact, data: Dataset) -> SidArtifact:
    return extend_sids(sids, data, store, encode=EncodeConfig())


@pytest.mark.parametrize("kind", [kind().kind for kind in KINDS])
def test_published_items_keep_their_codes_by_id(store: ArtifactStore, kind: str) -> None:
    sids = fitted(store, f"resolver.kind={kind}")
    order = np.random.default_rng(2).permutation(330)
    data = dataset(store, order, "grown")
    grown = extended(store, sids, data)
    width = sids.table.num_levels
    known = order < 250
    assert np.array_equal(grown.table.codes[known, :width], sids.table.codes[order[known]])
    # New items are coded by the frozen quantizer.
    raw = sids.load_quantizer().encode(VECTORS[order].astype(np.float32))
    assert np.array_equal(grown.raw.codes, raw)
    assert np.array_equal(grown.table.codes[~known, :1], raw[~known, :1])
    if kind != "bucket":
        counts = np.unique(grown.table.prefix_keys(grown.table.num_levels), return_counts=True)[1]
        assert counts.max() <= (5 if kind.endswith("cap") else 1)

    reopened = open_sids(store, grown.artifact.manifest.ref)
    assert reopened.artifact.manifest.parents == (grown.codes_artifact.key, data.key, sids.key)
    assert reopened.quantizer_artifact.key == sids.quantizer_artifact.key
    assert extended(store, sids, data).key == grown.key

    again = extended(store, reopened, dataset(store, np.arange(400), "more"))
    old_width = grown.table.num_levels
    assert np.array_equal(again.table.codes[order][:, :old_width], grown.table.codes)


def test_items_that_left_have_no_row(store: ArtifactStore) -> None:
    sids = fitted(store, "resolver.kind=zcr")
    kept = np.arange(100, 300)
    grown = extended(store, sids, dataset(store, kept, "moved-on"))
    assert grown.table.num_items == 200
    assert np.array_equal(grown.table.codes[:150], sids.table.codes[100:250])


def test_what_would_silently_go_wrong_is_refused(store: ArtifactStore) -> None:
    sids = fitted(store)
    with pytest.raises(DataError, match="must have 8 numbers"):
        extended(store, sids, dataset(store, np.arange(300), "narrow", dim=4))
    fresh = dataset(store, np.arange(300, 390), "strangers")
    with pytest.raises(DataError, match="got none of its 250"):
        extended(store, sids, fresh)
    fused = fitted(store, "vectors.behaviour.alpha=0.5", "vectors.behaviour.dim=4")
    with pytest.raises(ConfigError, match="fitted on its behaviour"):
        extended(store, fused, dataset(store, np.arange(300), "grown"))
    with pytest.raises(DataError, match=r"vectors\.space must be one of"):
        extend_sids(
            sids,
            dataset(store, np.arange(300), "grown"),
            store,
            encode=EncodeConfig(),
            space="image",
        )


def test_a_table_whose_dataset_is_gone_says_what_to_do(store: ArtifactStore) -> None:
    sids = fitted(store)
    store.remove(f"dataset/old-{sids.dataset_key[:12]}", force=True)
    with pytest.raises(DataError, match="Prepare it again"):
        extended(store, sids, dataset(store, np.arange(300), "grown"))


def test_another_space_of_the_same_name_is_encoded_anew(store: ArtifactStore) -> None:
    sids, data = fitted(store), dataset(store, np.arange(300), "grown")

    def extended_by(vectors: np.ndarray) -> SidArtifact:
        artifact = store.build(
            "vectors",
            "encoder",
            {"mean": float(vectors.mean())},
            parents=(data.key,),
            produce=lambda writer: _write_vectors(vectors, writer),
        )
        grown = extend_sids(sids, data, store, encode=EncodeConfig(), space="encoder")
        assert artifact.key in grown.codes_artifact.manifest.parents
        store.remove(artifact.manifest.ref, force=True)
        return grown

    first, second = (extended_by(VECTORS[:300].astype(np.float32) * sign) for sign in (1, -1))
    assert not np.array_equal(first.raw.codes, second.raw.codes)


def _write_vectors(vectors: np.ndarray, writer: ArtifactWriter) -> ArtifactInfo:
    schema = vectors_schema(vectors.shape[1], "float32")
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    index = pa.array(np.arange(len(vectors), dtype=np.int32))
    with writer.open("vectors", "part-00000.parquet") as stream:
        pq.write_table(pa.Table.from_arrays([index, flat], schema=schema), stream)
    return ArtifactInfo(rows={"items": len(vectors)})
