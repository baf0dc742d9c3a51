"""What fitting reads: pairs by source, teachers, users and their events; and how it is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import from_mapping, load_config
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.embed.teachers.base import TrainLog
from forge_ray.embed.vectors import VectorsConfig, open_vectors
from forge_ray.errors import ConfigError
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.quantizers.rq_vae import RqVaeConfig
from forge_ray.sid.quantizers.rq_vae_config import SelectionConfig
from forge_ray.sid.selection import ProxySelector
from forge_ray.sid.training_set import load_training_set, mean_vectors, user_events
from tests.evaluate.datasets import topic_dataset

VAE = ["quantizer.kind=rq_vae", "quantizer.levels=2", "quantizer.codebook_size=8"]
FAST = ["quantizer.max_steps=20", "quantizer.batch_size=64", "quantizer.pair_batch_size=32"]


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return topic_dataset(store)


def histories() -> TrainLog:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 40, size=rng.integers(0, 9)).tolist() for _ in range(60)]
    return TrainLog(np.arange(60), Ragged.from_lists(rows, dtype=np.int32), 40)


def test_events_join_items_of_a_user_and_users_of_an_item() -> None:
    log = histories()
    row = np.arange(40)
    row[::5] = -1
    row[row >= 0] = np.arange((row >= 0).sum())
    events = user_events(log, row, seed=0)
    item_of = np.flatnonzero(row >= 0)
    own = [set(log.items.row(user).tolist()) for user in range(60)]
    assert len(events) > 50
    for anchor, positive, user, other in zip(
        item_of[events.anchor], item_of[events.positive], events.user, events.user_positive,
        strict=True,
    ):  # fmt: skip
        assert anchor != positive
        assert user != other
        assert {anchor, positive} <= own[user]
        assert anchor in own[other]
    again = user_events(log, row, seed=0)
    assert np.array_equal(again.positive, events.positive)
    assert not np.array_equal(user_events(log, row, seed=1).positive, events.positive)


def test_users_are_the_means_of_their_items() -> None:
    log, row = histories(), np.arange(40)
    row[7] = -1
    vectors = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    found = mean_vectors(log, row, vectors)
    for user in range(60):
        items = [item for item in log.items.row(user).tolist() if item != 7]
        expected = vectors[items].mean(axis=0) if items else np.zeros(3)
        assert np.allclose(found[user], expected, atol=1e-6)


def test_each_kind_gets_what_it_reads(
    dataset: Dataset, store: ArtifactStore, tmp_path: Path
) -> None:
    source = open_vectors(VectorsConfig(), dataset, store)
    plain = load_training_set(RqKmeansConfig(), dataset, source, store, seed=0)
    assert np.array_equal(plain.vectors, dataset.vectors())
    assert not plain.pairs
    das = from_mapping(RqVaeConfig, {"alignment": {"kind": "das", "teacher": {"dim": 6}}})
    whole = load_training_set(
        das, dataset, source, store, seed=0, vector_file=tmp_path / "vectors.npy"
    )
    assert isinstance(whole.vectors, np.memmap)
    assert np.array_equal(whole.vectors, plain.vectors)
    assert whole.teachers["teacher"].shape == (300, 6)
    assert whole.users is not None
    assert whole.users.shape == (600, 8)
    assert whole.user_teachers["teacher"].shape == (600, 6)
    assert whole.user_teachers["teacher"].any(axis=1).all()
    assert set(whole.pairs) == {"interactions"}
    alone = from_mapping(
        RqVaeConfig, {"alignment": {"kind": "das"}, "pair_share": 0.0, "codebook_size": 8}
    )
    bare = load_training_set(alone, dataset, source, store, seed=0)
    assert not bare.teachers
    assert not bare.pairs
    few = from_mapping(
        RqVaeConfig,
        {
            "alignment": {"kind": "co_occurrence", "source": "semantic_knn"},
            "max_train_vectors": 80,
            "codebook_size": 8,
        },
    )
    part = load_training_set(few, dataset, source, store, seed=0)
    assert part.vectors.shape == (80, 8)
    assert len(part.pairs["semantic_knn"]) > 0
    assert part.pairs["semantic_knn"].anchor.max() < 80


def test_fitting_keeps_the_best_checkpoint_and_says_which(
    dataset: Dataset, store: ArtifactStore
) -> None:
    options = [*VAE, *FAST, "quantizer.alignment.kind=co_occurrence"]
    options += ["quantizer.alignment.source=semantic_knn"]
    sids = fit_sids(load_config(SidConfig, overrides=options), dataset, store)
    metrics = sids.quantizer_artifact.manifest.metrics
    assert metrics["kept_step"] in (5, 10, 15, 20)
    assert metrics["kept_metrics"].keys() == {"backoff_bits", "uniqueness", "gini"}
    assert not Path(store.root, ".scratch").exists() or not list(
        Path(store.root, ".scratch").iterdir()
    )
    # How training is spread decides nothing.
    spread = load_config(SidConfig, overrides=[*options, "train.checkpoint_every=3"])
    assert fit_sids(spread, dataset, store).key == sids.key


def test_measurements_tell_good_codes_from_bad(dataset: Dataset, store: ArtifactStore) -> None:
    source = open_vectors(VectorsConfig(), dataset, store)
    good, bad = (RqKmeansConfig(levels=2, codebook_size=10).build(8, seed=0) for _ in range(2))
    good.fit(load_training_set(RqKmeansConfig(), dataset, source, store, seed=0))
    bad.codebooks = [book * 0 + i for i, book in enumerate(good.codebooks)]
    for metric, sign in {"backoff_bits": -1, "embedding_hitrate": 1, "uniqueness": 1}.items():
        for limit in (1000, 120):
            config = SelectionConfig(metric=metric, max_items=limit, max_users=200)
            selector = ProxySelector(config, dataset, source, seed=0)
            best, worst = selector(good), selector(bad)
            assert sign * (best[metric] - worst[metric]) > 0, (metric, limit)
            assert config.is_better(best, worst)
            assert not config.is_better(worst, best)
            assert not config.is_better(best, best)
            sample = selector._sample
            assert sample is not None
            assert len(sample.vectors) == min(limit, 300)
            assert sample.probe.score.target.max() < len(sample.vectors)


def test_a_dataset_without_validation_users_says_what_to_set(
    dataset: Dataset, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dataset, "sequence_batches", lambda *_, **__: iter(()))
    source = open_vectors(VectorsConfig(), dataset, store)
    selector = ProxySelector(SelectionConfig(), dataset, source, seed=0)
    with pytest.raises(ConfigError, match=r"selection\.checks must be 0"):
        selector(RqKmeansConfig().build(8, seed=0))
