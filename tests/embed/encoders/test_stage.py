"""Encoding a catalogue: complete, resumable, never silently without an item."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.schema import Dataset
from forge_ray.embed.encoders import TextConfig
from forge_ray.embed.encoders.base import Encoded
from forge_ray.embed.encoders.model import find_model
from forge_ray.embed.encoders.stage import encode_items, plan_slices
from forge_ray.embed.encoders.text import TextEncoder
from forge_ray.embed.vectors import VectorsConfig, open_vectors
from forge_ray.errors import ConfigError, DataError
from tests.embed.encoders.models import catalogue, text_model, titles

COUNT = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return catalogue(store, {"title": titles(COUNT), "brand": titles(COUNT, seed=1)})


def config(folder: str, **fields: Any) -> TextConfig:
    return TextConfig(model=folder, name="words", **{"shard_rows": 10, **fields})


def vectors(space: str, dataset: Dataset, store: ArtifactStore) -> np.ndarray:
    found = open_vectors(VectorsConfig(space=space), dataset, store)
    return found.take(np.arange(dataset.num_items))


def test_slices_cover_every_row_once(dataset: Dataset) -> None:
    slices = plan_slices(dataset, 10)
    rows = [one.read(dataset.filesystem, ["title"])["item_index"].to_numpy() for one in slices]
    assert max(map(len, rows)) == 10
    assert sorted(np.concatenate(rows).tolist()) == list(range(COUNT))


@pytest.mark.ray
def test_every_item_has_the_vector_of_its_own_text(
    ray_local: None, folder: str, dataset: Dataset, store: ArtifactStore
) -> None:
    done: list[int] = []
    artifact = encode_items(
        config(folder, local_items=0),
        dataset,
        store,
        report=lambda count, total: done.append(count),
    )
    encoder = config(folder).load(find_model(folder))
    wanted = encoder.encode(dataset.items(["title"])).vectors
    for space in ("words", artifact.manifest.ref, artifact.key[:12]):
        np.testing.assert_allclose(vectors(space, dataset, store), wanted, atol=1e-3)
    assert done[-1] == COUNT
    assert done == sorted(done)
    assert artifact.manifest.rows == {"items": COUNT, "rejected": 0}
    again = encode_items(config(folder, batch_size=3, shard_rows=50), dataset, store)
    assert again.key == artifact.key
    wide = encode_items(config(folder, storage="float32", local_items=1000), dataset, store)
    assert wide.key != artifact.key
    np.testing.assert_allclose(vectors(wide.key, dataset, store), wanted, atol=1e-6)


def test_a_second_run_makes_only_the_missing_shards(
    folder: str,
    dataset: Dataset,
    store: ArtifactStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = encode_items(config(folder), dataset, store)
    elsewhere = ArtifactStore(tmp_path / "other")
    encode, calls = TextEncoder.encode, iter(range(5))

    def dies_at_the_sixth(self: TextEncoder, items: pa.Table) -> Encoded:
        if next(calls, None) is None:
            raise RuntimeError("killed")
        return encode(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", dies_at_the_sixth)
        with pytest.raises(RuntimeError, match="killed"):
            encode_items(config(folder), dataset, elsewhere)
    (scratch,) = Path(elsewhere.root, ".scratch").iterdir()
    (scratch / ".half-written").write_bytes(b"x")
    resumed = encode_items(config(folder), dataset, elsewhere)
    assert resumed.manifest.metrics["shards_resumed"] == 5
    assert resumed.manifest.metrics["shards"] == whole.manifest.metrics["shards"] > 10
    np.testing.assert_array_equal(
        vectors("words", dataset, elsewhere), vectors("words", dataset, store)
    )
    assert not scratch.exists()


def test_items_without_text_stop_the_stage_or_are_listed(folder: str, store: ArtifactStore) -> None:
    texts: list[str | None] = [*titles(COUNT)]
    texts[3], texts[70] = None, "  "
    dataset = catalogue(store, {"title": texts})
    with pytest.raises(DataError, match=r"items\.title must hold text .* 2 empty .*missing=zero"):
        encode_items(config(folder), dataset, store)
    artifact = encode_items(config(folder, missing="zero"), dataset, store)
    assert artifact.manifest.metrics["rejected"] == {"empty": 2}
    listed = pq.read_table(artifact.path("rejected", "part-00000.parquet"))
    assert sorted(listed["item_id"].to_pylist()) == ["i003", "i070"]
    assert set(listed["cause"].to_pylist()) == {"empty"}
    found = vectors("words", dataset, store)
    assert np.flatnonzero(~found.any(axis=1)).tolist() == [3, 70]
    # The zero vectors are published now; who asks for complete ones is still told.
    with pytest.raises(DataError, match="2 empty"):
        encode_items(config(folder), dataset, store)


def test_mistakes_are_named_before_any_work(
    folder: str, dataset: Dataset, store: ArtifactStore
) -> None:
    with pytest.raises(ConfigError, match="columns of the items, got 'heading'; they have item_"):
        encode_items(config(folder, columns=["heading"]), dataset, store)
    with pytest.raises(ConfigError, match="must be a folder or a name on the hub, got 'no/where'"):
        encode_items(config("no/where"), dataset, store)
    with pytest.raises(DataError, match=r"vectors\.space must be one of"):
        vectors("words", dataset, store)


@pytest.mark.slow
def test_a_killed_stage_resumes(folder: str, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    dataset = catalogue(store, {"title": titles(1500)}, files=1, group_rows=1500)
    words = [
        sys.executable, "-c", "from forge_ray.cli import main; main()", "embed", "text",
        dataset.artifact.root, "--model", folder, "--name", "words",
        "--store", store.uri, "--json", "shard_rows=1", "local_items=0",
    ]  # fmt: skip
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    scratch = Path(store.root, ".scratch")
    deadline = time.monotonic() + 120
    while sum(1 for _ in scratch.glob("*/part-*")) < 20:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not store.manifests("vectors")
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    (manifest,) = store.manifests("vectors")
    assert 20 <= manifest.metrics["shards_resumed"] < 1500
    encoder = TextConfig(model=folder).load(find_model(folder))
    wanted = encoder.encode(dataset.items(["title"])).vectors
    np.testing.assert_allclose(vectors("words", dataset, store), wanted, atol=1e-3)
