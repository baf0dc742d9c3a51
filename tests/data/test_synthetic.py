"""The synthetic data set: bytes fixed by the seed, and the structure it claims."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from forge_ray.config import to_yaml
from forge_ray.data import synthetic
from forge_ray.data.synthetic import SyntheticConfig, World, generate, walk
from forge_ray.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def config() -> SyntheticConfig:
    return SyntheticConfig(num_items=600, num_users=1500, branching=[4, 4], vector_dim=16)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.parquet"))
    }


@pytest.mark.ray
def test_seed_fixes_every_byte(ray_local: None, config: SyntheticConfig, tmp_path: Path) -> None:
    config.users_per_shard, config.items_per_shard = 400, 256
    generate(config, str(tmp_path / "distributed"))
    # The same shards, written one after the other in this process and in reverse order.
    target = {"config": config, "filesystem": synthetic.pafs.LocalFileSystem()}
    root = tmp_path / "serial"
    for part in ("items", "vectors", "interactions"):
        (root / part).mkdir(parents=True)
    for number in (3, 2, 1, 0):
        list(synthetic._write_users(number, root=str(root), **target))
    for number in (2, 1, 0):
        list(synthetic._write_items(number, root=str(root), **target))
    assert digests(root) == digests(tmp_path / "distributed")
    assert len(digests(root)) == 10
    ids = pq.read_table(root / "items")["item_id"].to_pylist()
    assert len(set(ids)) == config.num_items


@pytest.mark.ray
def test_refuses_a_folder_with_other_data(
    ray_local: None, config: SyntheticConfig, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="must be empty or hold this data set"):
        generate(config, str(tmp_path))


def test_neither_imported_data_nor_another_cut_off_run_is_overwritten(
    config: SyntheticConfig, tmp_path: Path
) -> None:
    (tmp_path / "interactions").mkdir()
    shard = tmp_path / "interactions" / "part-00000.parquet"
    shard.write_bytes(b"mine")
    with pytest.raises(DataError, match="must be empty or hold this data set"):
        generate(config, str(tmp_path))
    assert shard.read_bytes() == b"mine"
    (tmp_path / synthetic._STARTED).write_text(to_yaml(config))
    target = (config, synthetic.pafs.LocalFileSystem(), str(tmp_path))
    assert not synthetic._is_complete(*target), "the same run may be completed"
    (tmp_path / synthetic._STARTED).write_text(to_yaml(SyntheticConfig()))
    with pytest.raises(DataError, match="must be empty or hold this data set"):
        synthetic._is_complete(*target)


def walks_of(config: SyntheticConfig) -> synthetic.Walks:
    return walk(World(config), config.num_users, np.random.default_rng(1))


def test_events_are_ordered_unique_and_released(config: SyntheticConfig) -> None:
    walks = walks_of(config)
    same_user = np.diff(walks.users) == 0
    assert (np.diff(walks.users) >= 0).all()
    assert (np.diff(walks.times)[same_user] >= 0).all()
    keys = walks.users * config.num_items + walks.items
    assert len(np.unique(keys)) == len(keys)
    days = (walks.times - config.start) // 86_400
    assert days.min() >= 0
    assert days.max() < config.num_days
    # Every day sees a good share of the users, so that temporal stages have held-out users.
    assert np.bincount(days).min() > len(days) / config.num_days / 2


def test_planted_structure_is_there(config: SyntheticConfig) -> None:
    walks = walks_of(config)
    counts = np.sort(np.bincount(walks.items, minlength=config.num_items))[::-1]
    assert counts[: config.num_items // 10].sum() > 0.25 * counts.sum(), "popularity is skewed"
    assert 0 < (counts == 0).mean() < 0.2, "some items are cold"
    same_user = np.diff(walks.users) == 0
    topic = walks.items % config.num_topics
    stays = (np.diff(topic) == 0)[same_user].mean()
    assert stays > 4 / config.num_topics, "the next topic depends on the one before"
    world = World(config)
    items = np.arange(config.num_items)
    vectors = synthetic._item_vectors(world, items, np.random.default_rng(0))
    near = np.argsort(-(vectors @ vectors.T), axis=1)[:, 1:6]
    assert (near % config.num_topics == items[:, None] % config.num_topics).mean() > 0.5


def test_drift_moves_popularity(config: SyntheticConfig) -> None:
    world = World(config)
    uniform, topics = np.full(5, 0.3), np.zeros(5, dtype=np.int64)
    early = world.places(topics, uniform, np.zeros(5))
    late = world.places(topics, uniform, np.full(5, 29.0))
    assert (early != late).all()


def test_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="num_items must be >= the 64 topics"):
        SyntheticConfig(num_items=10)
    with pytest.raises(ConfigError, match="seed must be >= 0"):
        SyntheticConfig(seed=-1)
    with pytest.raises(ConfigError, match="users_per_shard must be >= 1"):
        SyntheticConfig(users_per_shard=0)
    with pytest.raises(ConfigError, match=r"must be <= 1, got 1\.5"):
        SyntheticConfig(link_share=1.0)
