"""open_vectors: every transform is an artifact of its own, read from the train part only."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import from_mapping, load_config, to_mapping
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset, vectors_schema
from forge_ray.embed.pairs import load_pairs
from forge_ray.embed.vectors import VectorsConfig, open_space, open_vectors, train_counts
from forge_ray.errors import ConfigError, DataError
from tests.evaluate.datasets import topic_dataset, write_dataset

SHORT = ("adapter.steps=3", "adapter.batch_size=16")
TRANSFORMS = {
    "smooth": ("smooth.gamma=0.5",),
    "knn": ("smooth.gamma=0.5", "smooth.graph=knn"),
    "adapter": ("adapter.rank=2", *SHORT),
    "behaviour": ("behaviour.alpha=0.5", "behaviour.dim=4"),
    "swing": ("behaviour.alpha=0.5", "behaviour.dim=4", "counts.kind=swing"),
    "all": ("smooth.gamma=0.5", "adapter.rank=2", *SHORT, "behaviour.alpha=0.5"),
}


def config(*overrides: str) -> VectorsConfig:
    return load_config(VectorsConfig, overrides=overrides)


def everything(settings: VectorsConfig, dataset: Dataset, store: ArtifactStore) -> np.ndarray:
    source = open_vectors(settings, dataset, store)
    return source.take(np.arange(source.num_items))


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return topic_dataset(store, num_items=60, num_users=80)


def with_held_out(store: ArtifactStore, held_out: Sequence[int], name: str) -> Dataset:
    """One train part; the last two items of every user are `held_out`."""
    rng = np.random.default_rng(0)
    train = rng.integers(0, 30, size=(50, 5))
    rows = [[*row, *held_out] for row in train.tolist()]
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    ids = np.array([f"i{number:02d}" for number in range(40)])
    sequences = Ragged.from_lists(rows, dtype=np.int32)
    return write_dataset(store, sequences, item_ids=ids, vectors=vectors, name=name)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_only_the_train_part_is_read(store: ArtifactStore, name: str) -> None:
    """Items 38 and 39 follow each other in every held-out part of one dataset, and never else."""
    plain = with_held_out(store, [0, 1], "plain")
    planted = with_held_out(store, [38, 39], "planted")
    settings = config(*TRANSFORMS[name])
    changed = everything(settings, planted, store)
    assert changed.tobytes() == everything(settings, plain, store).tobytes()
    assert not np.allclose(changed, planted.vectors())
    counts = train_counts(settings.counts, planted)
    assert counts.nnz > 0
    assert not counts[[38, 39]].nnz
    for source in ("swing", "semantic_knn"):
        first, second = (
            load_pairs(source, one, store, vectors=open_vectors(config(), one, store))
            for one in (plain, planted)
        )
        assert np.array_equal(first.positive, second.positive)
        assert np.array_equal(first.weight, second.weight)


def test_what_is_off_changes_nothing(dataset: Dataset, store: ArtifactStore) -> None:
    unused = ("smooth.neighbours=3", "adapter.steps=9", "behaviour.dim=9", "counts.kind=swing")
    plain = open_vectors(config(*unused), dataset, store)
    assert plain.key == dataset.key
    assert config(*unused).canonical() == VectorsConfig()
    assert np.array_equal(plain.take(np.arange(60)), dataset.vectors())
    by_vectors = config(*TRANSFORMS["knn"], "counts.window=7")
    assert by_vectors.canonical() == config(*TRANSFORMS["knn"])


def test_every_transform_is_built_once_under_its_own_key(
    dataset: Dataset, store: ArtifactStore
) -> None:
    keys = {}
    for name, overrides in TRANSFORMS.items():
        source = open_vectors(config(*overrides), dataset, store)
        assert source.dim == 8
        keys[name] = source.key
        manifest = store.find("vectors", source.key).manifest
        stored = from_mapping(VectorsConfig, manifest.config)
        assert open_vectors(stored, dataset, store).key == source.key
        assert to_mapping(stored) == manifest.config
        assert manifest.parents == (dataset.key,)
        words = shlex.split(manifest.command)[4:]
        assert config(*(word.removeprefix("vectors.") for word in words)) == stored
    assert len(set(keys.values())) == len(TRANSFORMS)
    assert "smoothed-adapted-fused" in store.find("vectors", keys["all"]).manifest.name
    assert len(store.manifests("vectors")) == len(TRANSFORMS)


def test_side_columns_are_learned(store: ArtifactStore) -> None:
    """The vectors say nothing about the topic, the column does."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, 10, size=8) * 6 + user % 6 for user in range(200)]
    dataset = write_dataset(
        store,
        Ragged.from_lists(rows, dtype=np.int32),
        item_ids=np.array([f"i{number:02d}" for number in range(60)]),
        vectors=rng.normal(size=(60, 8)).astype(np.float32),
    )
    folder = dataset.artifact.files("items/")[0]
    table = pq.read_table(folder).append_column("topic", pa.array(np.arange(60) % 6))
    pq.write_table(table, folder)
    settings = config(
        "side=[topic]", "adapter.steps=40", "adapter.batch_size=64", "adapter.learning_rate=0.02"
    )
    changed = everything(settings, dataset, store)
    moved = changed - dataset.vectors()
    np.testing.assert_allclose(moved[:6], moved[6:12], atol=1e-4)
    assert np.linalg.norm(moved[0] - moved[1]) > 0.1
    with pytest.raises(ConfigError, match=r"vectors\.side must name columns .*topic.* got 'brand'"):
        open_vectors(config("side=[brand]"), dataset, store)
    with pytest.raises(ConfigError, match="must name each column once"):
        config("side=[topic, topic]")


def test_an_encoders_artifact_is_a_space(dataset: Dataset, store: ArtifactStore) -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4)
        index = pa.array(np.arange(60), pa.int32())
        table = pa.Table.from_arrays([index, column], schema=vectors_schema(4, "float32"))
        with writer.open("vectors", "part-0.parquet") as stream:
            pq.write_table(table, stream)
        return ArtifactInfo(rows={"items": 60})

    made = store.build("vectors", "titles", {"model": "m"}, produce=produce, parents=(dataset.key,))
    for name in ("titles", made.manifest.ref, made.key[:12]):
        found = open_space(name, dataset, store)
        assert (found.key, found.dim) == (made.key, 4)
        assert np.array_equal(found.take(np.arange(60)), vectors)
    smoothed = open_vectors(config("space=titles", "smooth.gamma=1"), dataset, store)
    assert smoothed.dim == 4
    assert store.find("vectors", smoothed.key).manifest.parents == (dataset.key, made.key)
    other = with_held_out(store, [0, 1], "other")
    with pytest.raises(DataError, match=r"vectors\.space must be one of \['default'\]"):
        open_space("titles", other, store)
    store.build("vectors", "titles", {"model": "n"}, produce=produce, parents=(dataset.key,))
    with pytest.raises(DataError, match=r"titles-.*titles-"):
        open_space("titles", dataset, store)


def test_pairs_of_every_source(dataset: Dataset, store: ArtifactStore) -> None:
    vectors = open_vectors(config(), dataset, store)
    for source in ("swing", "semantic_knn"):
        pairs = load_pairs(source, dataset, store, vectors=vectors, top_k=3)
        assert np.bincount(pairs.anchor, minlength=60).max() == 3
        assert (pairs.anchor != pairs.positive).all()
        same = pairs.anchor[1:] == pairs.anchor[:-1]
        assert (np.diff(pairs.weight)[same] <= 0).all()
        assert (pairs.anchor % 10 == pairs.positive % 10).mean() > 0.9
    assert len(store.manifests("pairs")) == 2
    with pytest.raises(DataError, match=r"pairs\.window >= 1"):
        load_pairs("i2i", dataset, store, vectors=vectors)
    with pytest.raises(ConfigError, match="must be one of co_occurrence, i2i, swing"):
        load_pairs("u2i", dataset, store, vectors=vectors)


MEMORY = """
import json, sys
from pathlib import Path

import numpy as np
from forge_ray.config import load_config
from forge_ray.data.ragged import Ragged
from forge_ray.embed.transform import transform
from forge_ray.embed.vectors import VectorsConfig
from forge_ray.threads import set_threads

def memory(name):
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(name))

set_threads(1)
config = load_config(VectorsConfig, overrides=sys.argv[1:])
transform(np.eye(9, dtype=np.float32), config.counts.count([], 9), config.transforms)
N, D = 200_000, 48
rng = np.random.default_rng(0)
group = rng.integers(0, 500, size=(30_000, 1))
batches = [Ragged.from_lists(np.empty((0, 1)), dtype=np.int32)] + [
    Ragged(((group[a:a + 10_000] * 400 + rng.integers(0, 400, size=(10_000, 12))) % N)
           .astype(np.int32).ravel(), np.arange(0, 120_001, 12))
    for a in (0, 10_000, 20_000)
]
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
before = memory("VmRSS")
vectors = rng.standard_normal((N, D), dtype=np.float32)
counts = config.counts.count(batches, N)
transform(vectors, counts, config.transforms)
used = memory("VmHWM") - before
print(json.dumps([used, config.transforms.peak_bytes(N, D, counts.nnz), counts.nnz]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize(
    "overrides",
    [
        ("behaviour.alpha=0.5", "behaviour.dim=24"),
        ("smooth.gamma=0.5", "adapter.rank=2", *SHORT, "counts.kind=swing"),
    ],
)
def test_memory_stays_below_what_is_stated(overrides: tuple[str, ...]) -> None:
    """At 200,000 items, where a dense N x N matrix would take 160 GB."""
    command = [sys.executable, "-c", MEMORY, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    used, stated, related = json.loads(done.stdout.strip().splitlines()[-1])
    assert related > 50_000
    # At least the vectors and their changed copy; the bound is no order of magnitude too large.
    assert 2 * 4 * 200_000 * 48 < used < stated < 6 * used + 3e8
