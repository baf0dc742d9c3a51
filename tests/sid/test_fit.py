"""fit_sids: two artifacts that are built once, carry their lineage, and encode every item."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.artifacts import ArtifactStore, ArtifactWriter
from forge_ray.config import from_mapping, load_config, to_mapping
from forge_ray.data.schema import Dataset
from forge_ray.embed.vectors import BehaviourConfig, VectorsConfig, VectorSet, open_vectors
from forge_ray.errors import ArtifactError, ConfigError, DataError
from forge_ray.sid import fit as fit_module
from forge_ray.sid.config import EncodeConfig, SidConfig
from forge_ray.sid.encode import encode_catalogue
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.quantizers.base import TrainingPairs
from forge_ray.sid.storage import QuantizerState, load_quantizer, open_sids
from forge_ray.sid.training_set import training_items
from tests.evaluate.datasets import topic_dataset

SMALL = ["quantizer.levels=2", "quantizer.codebook_size=8"]
CAPPED = [*SMALL, "resolver.kind=knn_cap", "resolver.cap=8"]


def config(*overrides: str) -> SidConfig:
    return load_config(SidConfig, overrides=overrides)


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return topic_dataset(store)


def test_table_lineage_and_reload(dataset: Dataset, store: ArtifactStore) -> None:
    sids = fit_sids(config(*CAPPED), dataset, store)
    assert sids.table.num_items == dataset.num_items
    assert sids.table.resolver == "knn_cap"
    assert sids.raw.resolver == "none"
    assert sids.table.parent == sids.raw.key == sids.codes_artifact.key
    assert sids.raw.parent == sids.quantizer_artifact.key
    assert sids.artifact.manifest.parents == (sids.raw.key, dataset.key)
    occupancy = np.unique(sids.table.prefix_keys(2), return_counts=True)[1]
    assert occupancy.max() <= 8 + sids.artifact.manifest.metrics["unplaced"]

    again = open_sids(store, sids.artifact.manifest.ref)
    assert np.array_equal(again.table.codes, sids.table.codes)
    quantizer = again.load_quantizer()
    assert np.array_equal(quantizer.encode(dataset.vectors()), sids.raw.codes)
    metrics = sids.quantizer_artifact.manifest.metrics
    assert metrics["seconds_fit"] >= 0
    assert len(metrics["loss_curve"]) == 2


def test_stored_configuration_reruns_to_the_same_artifact(
    dataset: Dataset, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit_sids(config(*CAPPED), dataset, store)
    stored = from_mapping(SidConfig, first.artifact.manifest.config)
    assert to_mapping(first.config) == to_mapping(stored)
    calls = count_fits(monkeypatch)
    assert fit_sids(stored, dataset, store).key == first.key
    assert calls == []
    words = first.artifact.manifest.command.split()
    overrides = [word.strip("'") for word in words[4:]]
    assert fit_sids(config(*overrides), dataset, store).key == first.key


def test_only_what_differs_is_computed(
    dataset: Dataset, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit_sids(config(*SMALL), dataset, store)
    calls = count_fits(monkeypatch)
    capped = fit_sids(config(*CAPPED), dataset, store)
    assert capped.quantizer_artifact.key == first.quantizer_artifact.key
    assert capped.key != first.key
    # Neither how work is spread nor a switch that is off decides the codes.
    spread = fit_sids(config(*SMALL, "encode.batch_rows=7"), dataset, store)
    unused = fit_sids(config(*SMALL, "vectors.counts.window=9"), dataset, store)
    assert spread.key == unused.key == first.key
    assert calls == []
    for change in ("seed=1", "quantizer.iterations=3", "vectors.behaviour.alpha=0.5"):
        assert fit_sids(config(*SMALL, change), dataset, store).key != first.key
    assert len(calls) == 3


def count_fits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    real = fit_module._fit

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(fit_module, "_fit", counted)
    return calls


def test_every_kind_and_resolver_goes_through(dataset: Dataset, store: ArtifactStore) -> None:
    for kind in ("rq_kmeans", "random", "rq_vae"):
        options = [f"quantizer.kind={kind}", *SMALL]
        if kind == "rq_vae":
            options += ["quantizer.alignment.kind=none", "quantizer.max_steps=5"]
        for resolver in ("bucket", "extra_token", "knn_cap"):
            sids = fit_sids(config(*options, f"resolver.kind={resolver}"), dataset, store)
            assert sids.table.num_levels == (3 if resolver == "extra_token" else 2)
            assert sids.raw.codebook_sizes == (8, 8)


def test_alignment_needs_pairs(dataset: Dataset, store: ArtifactStore) -> None:
    with pytest.raises(DataError, match="align without pairs"):
        fit_sids(config("quantizer.kind=rq_vae", *SMALL), dataset, store)


def test_errors_name_the_field(dataset: Dataset, store: ArtifactStore) -> None:
    with pytest.raises(ConfigError, match="must be <= the number of training vectors"):
        fit_sids(config("quantizer.codebook_size=512"), dataset, store)
    with pytest.raises(DataError, match=r"vectors\.space must be one of"):
        fit_sids(config("vectors.space=image"), dataset, store)
    with pytest.raises(ConfigError, match=r"one of .*rq_kmeans.*, got 'rq_kmean'"):
        config("quantizer.kind=rq_kmean")
    with pytest.raises(ConfigError, match="seed must be >= 0"):
        config("seed=-1")
    with pytest.raises(ArtifactError, match="must name one sids"):
        open_sids(store, dataset.artifact.manifest.ref)
    with pytest.raises(ArtifactError, match="kind 'sids'"):
        open_sids(store, dataset.artifact.root)


def test_fused_vectors_are_an_artifact_of_their_own(dataset: Dataset, store: ArtifactStore) -> None:
    fused = VectorsConfig(behaviour=BehaviourConfig(alpha=0.5, dim=8))
    source = open_vectors(fused, dataset, store)
    assert source.key != dataset.key
    everything = source.take(np.arange(source.num_items))
    assert everything.shape == dataset.vectors().shape
    assert not np.allclose(everything, dataset.vectors())
    order = np.array([5, 2, 9])
    assert np.array_equal(source.take(order), everything[order])
    plain = open_vectors(VectorsConfig(), dataset, store)
    assert np.array_equal(plain.take(np.arange(plain.num_items)), dataset.vectors())


def test_training_sample_keeps_both_ends_of_pairs() -> None:
    rng = np.random.default_rng(0)
    pairs = TrainingPairs(rng.integers(0, 1000, 300), rng.integers(0, 1000, 300))
    chosen = training_items(1000, 200, pairs, seed=0)
    assert len(np.unique(chosen)) == len(chosen) == 200
    whole = np.isin(pairs.anchor, chosen) & np.isin(pairs.positive, chosen)
    assert whole.sum() >= 50
    assert np.array_equal(chosen, training_items(1000, 200, pairs, seed=0))
    assert not np.array_equal(chosen, training_items(1000, 200, pairs, seed=1))
    assert np.array_equal(training_items(10, 200, pairs, seed=0), np.arange(10))


def test_a_sample_smaller_than_the_catalogue_still_codes_every_item(
    dataset: Dataset, store: ArtifactStore
) -> None:
    sids = fit_sids(config(*SMALL, "quantizer.max_train_vectors=50"), dataset, store)
    assert sids.table.num_items == 300


def test_a_truncated_quantizer_says_how_to_rebuild(dataset: Dataset, store: ArtifactStore) -> None:
    sids = fit_sids(config(*SMALL), dataset, store)
    sids.quantizer_artifact.local("quantizer.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="forge-ray sid fit"):
        open_sids(store, sids.artifact.manifest.ref)


def test_loading_needs_no_configuration_file(dataset: Dataset, store: ArtifactStore) -> None:
    sids = fit_sids(config(*SMALL), dataset, store)
    again = load_quantizer(store.open(sids.quantizer_artifact.manifest.ref))
    assert again.input_dim == 8
    assert again.codebook_sizes == (8, 8)


@pytest.mark.ray
def test_encoding_on_ray_equals_encoding_here(
    ray_local: None, dataset: Dataset, store: ArtifactStore, tmp_path: Any
) -> None:
    """From inside a placement group whose only CPU the caller holds, as in a sweep's trial."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    here = fit_sids(config(*SMALL), dataset, store)
    elsewhere = ArtifactStore(tmp_path / "other")
    options = ("encode.local_items=0", "encode.batch_rows=64", "encode.max_actors=1")
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)

    @ray.remote(num_cpus=1, scheduling_strategy=strategy)
    def trial(settings: SidConfig, store: ArtifactStore) -> tuple[str, np.ndarray]:
        sids = fit_sids(settings, topic_dataset(store), store)
        return sids.key, np.array(sids.raw.codes)

    settings = config(*SMALL, *options)
    key, codes = ray.get(trial.remote(settings, elsewhere), timeout=120)
    remove_placement_group(group)
    assert key == here.key
    assert np.array_equal(codes, here.raw.codes)


@pytest.mark.ray
def test_a_killed_encoding_continues_with_the_missing_shards(
    ray_local: None, dataset: Dataset, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fit_sids(config(*SMALL, "vectors.behaviour.alpha=0.5"), dataset, store)
    source = split_shards(open_vectors(here.config.vectors, dataset, store), store, shards=3)
    state = QuantizerState.open(here.quantizer_artifact)
    settings = EncodeConfig(local_items=0, max_actors=1)
    writer = ArtifactWriter(store.filesystem, f"{store.root}/half", f"{store.root}/.scratch/half")
    whole = encode_catalogue(state, source, settings, writer)
    assert (whole.shards, whole.shards_resumed) == (3, 0)
    assert np.array_equal(whole.codes, here.raw.codes)
    # As after a kill: one shard is missing, another was being written.
    folder = f"{writer.scratch}/codes-00001.npz"
    store.filesystem.move(folder, f"{writer.scratch}/.codes-00001.npz-partial")
    again = encode_catalogue(state, source, settings, writer)
    assert again.shards_resumed == 2
    assert np.array_equal(again.codes, whole.codes)


def split_shards(source: VectorSet, store: ArtifactStore, *, shards: int) -> VectorSet:
    """The same vectors in several files."""
    vectors = source.take(np.arange(source.num_items))
    rows = np.array_split(np.arange(source.num_items), shards)
    store.filesystem.create_dir(f"{store.root}/split")
    paths = []
    for number, part in enumerate(rows):
        paths.append(f"{store.root}/split/part-{number}.parquet")
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors[part].ravel()), source.dim)
        table = pa.table({"item_index": pa.array(part, pa.int32()), "vector": values})
        pq.write_table(table, paths[-1])
    return dataclasses.replace(source, filesystem=store.filesystem, files=tuple(paths))
