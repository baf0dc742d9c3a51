"""Resolving through Ray Data, cut by prefix, equals resolving in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.data.hashing import distinct_hashes
from forge_ray.data.schema import vectors_schema
from forge_ray.embed.vectors import VectorSet
from forge_ray.sid import resolve as resolve_module
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.quantizers.base import Quantizer, QuantizerConfig, TrainingSet
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.quantizers.shuffled import ShuffledConfig
from forge_ray.sid.resolve import place_here, place_on_ray
from forge_ray.sid.resolvers import (
    KINDS,
    KnnCapConfig,
    Problem,
    RandomCapConfig,
    ResolverConfig,
    ZcrConfig,
)
from forge_ray.sid.resolvers.base import complete
from forge_ray.sid.storage import QuantizerState
from tests.evaluate.datasets import topic_dataset

CONFIGS = [
    *(kind() for kind in KINDS if kind not in (KnnCapConfig, RandomCapConfig)),
    KnnCapConfig(cap=2, candidates=3),
    KnnCapConfig(cap=2, order="priority"),
    RandomCapConfig(cap=1, seed=3),
]


def write_shards(folder: Path, vectors: np.ndarray, *, shards: int) -> VectorSet:
    """Items in random order, spread over several files."""
    order = np.random.default_rng(0).permutation(len(vectors)).astype(np.int32)
    files = []
    for number, items in enumerate(np.array_split(order, shards)):
        flat = pa.array(vectors[items].reshape(-1), pa.float32())
        columns = [pa.array(items), pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])]
        path = str(folder / f"part-{number}.parquet")
        schema = vectors_schema(vectors.shape[1], "float32")
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), path)
        files.append(path)
    return VectorSet("key", LocalFileSystem(), tuple(files), len(vectors), vectors.shape[1])


def catalogue(folder: Path, config: QuantizerConfig) -> tuple[Problem, VectorSet, QuantizerState]:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(900, 6)).astype(np.float32) * [4, 3, 1, 1, 1, 1]
    quantizer: Quantizer = config.build(6, seed=0)
    quantizer.fit(TrainingSet(vectors.astype(np.float32)))
    source = write_shards(folder, vectors, shards=3)
    order = quantizer.item_order(900)
    codes = quantizer.encode(vectors.astype(np.float32))
    problem = Problem(
        codes=(codes if order is None else codes[order]).astype(np.uint16),
        codebook_sizes=quantizer.codebook_sizes,
        hashes=distinct_hashes(np.arange(900)),
        train_counts=rng.integers(0, 5, 900),
    )
    return problem, source, QuantizerState.of(quantizer, config)


def check_equal(
    config: ResolverConfig, problem: Problem, source: VectorSet, state: QuantizerState
) -> np.ndarray:
    here = complete(config, place_here(config, problem, source, state.load()), problem)
    there = complete(
        config, place_on_ray(config, problem, source, state, partition_rows=250), problem
    )
    assert np.array_equal(there.codes, here.codes)
    assert there.codebook_sizes == here.codebook_sizes
    assert np.array_equal(there.over_capacity, here.over_capacity)
    assert there.report == pytest.approx(here.report, rel=1e-5)
    return here.codes


@pytest.mark.ray
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_partitions_equal_one_process(
    ray_local: None, tmp_path: Path, config: ResolverConfig
) -> None:
    problem, source, state = catalogue(tmp_path, RqKmeansConfig(levels=3, sizes=[4, 6, 128]))
    codes = check_equal(config, problem, source, state)
    if config.level_written(3) is not None:
        assert codes.shape[1] > 3 or (codes != problem.codes).any()
    published = np.where(np.arange(900)[:, None] < 300, codes, -1)
    grown = check_equal(config, replace(problem, published=published), source, state)
    assert np.array_equal(grown[:300], codes[:300])


@pytest.mark.ray
def test_nothing_to_move_and_one_prefix_per_item(ray_local: None, tmp_path: Path) -> None:
    problem, source, state = catalogue(tmp_path, RqKmeansConfig(levels=2, sizes=[256, 4]))
    codes = np.column_stack([np.arange(900), np.zeros(900, int)])
    alone = replace(problem, codes=codes, codebook_sizes=(900, 4))
    assert np.array_equal(check_equal(ZcrConfig(), alone, source, state), codes)


@pytest.mark.ray
def test_a_shuffled_control_asks_for_the_vectors_that_were_coded(
    ray_local: None, tmp_path: Path
) -> None:
    inner = RqKmeansConfig(levels=2, sizes=[16, 64])
    problem, source, state = catalogue(tmp_path, ShuffledConfig(of=inner))
    assert len(KnnCapConfig(cap=2).rows_to_place(problem)) > 0
    check_equal(KnnCapConfig(cap=2), problem, source, state)
    # Unshuffled, the same items would be coded by the same vectors: one table, dealt out anew.
    plain, _, plain_state = catalogue(tmp_path, inner)
    order = state.load().item_order(900)
    assert order is not None
    dealt = replace(problem, hashes=plain.hashes[order])
    config = KnnCapConfig(cap=2)
    expected = place_here(config, plain, source, plain_state.load()).codes[order]
    assert np.array_equal(place_here(config, dealt, source, state.load()).codes, expected)


@pytest.mark.ray
def test_a_large_catalogue_goes_through_ray_and_gives_the_same_artifact_content(
    ray_local: None, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quantizer.levels=2", "quantizer.codebook_size=16", "resolver.kind=zcr"]
    here = fit_sids(load_config(SidConfig, overrides=words), topic_dataset(store), store)
    calls: list[int] = []
    real = resolve_module.place_on_ray
    monkeypatch.setattr(
        resolve_module, "place_on_ray", lambda *given: (calls.append(1), real(*given))[1]
    )
    elsewhere = ArtifactStore(tmp_path / "other")
    spread = load_config(SidConfig, overrides=[*words, "encode.local_items=10"])
    there = fit_sids(spread, topic_dataset(elsewhere), elsewhere)
    assert calls == [1]
    assert there.key == here.key
    assert np.array_equal(there.table.codes, here.table.codes)
