"""Teachers are artifacts of the train part: the same log gives the same bytes, others none."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config, to_mapping
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.embed.teachers import KINDS, TeacherConfig, load_teacher
from forge_ray.errors import ConfigError, DataError
from tests.evaluate.datasets import write_dataset

QUICK = {"ppmi_svd": {}, "sasrec": {"epochs": 2}, "two_tower": {"epochs": 2}}


def histories(*, held_out_seed: int) -> Ragged:
    """Forty users inside one of two halves of 30 items; the last two items vary with the seed."""
    rng = np.random.default_rng(0)
    other = np.random.default_rng(held_out_seed)
    rows = [
        np.concatenate([rng.integers(0, 14, size=6), other.integers(0, 14, size=2)])
        + 14 * (user % 2)
        for user in range(40)
    ]
    return Ragged.from_lists(rows, dtype=np.int32)


def dataset(store: ArtifactStore, *, held_out_seed: int = 1) -> Dataset:
    ids = np.array([f"i{number:02d}" for number in range(30)])
    name = f"toy{held_out_seed}"
    return write_dataset(store, histories(held_out_seed=held_out_seed), item_ids=ids, name=name)


def config(kind: type[TeacherConfig]) -> TeacherConfig:
    name = str(kind.__dataclass_fields__["kind"].default)
    return kind(dim=8, **QUICK[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_never_sees_what_is_held_out(
    kind: type[TeacherConfig], store: ArtifactStore
) -> None:
    first = load_teacher(config(kind), dataset(store, held_out_seed=1), store)
    other = load_teacher(config(kind), dataset(store, held_out_seed=2), store)
    assert first.artifact.key != other.artifact.key
    assert first.items.tobytes() == other.items.tobytes()
    assert first.users.tobytes() == other.users.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_unseen_items(kind: type[TeacherConfig], store: ArtifactStore) -> None:
    data = dataset(store)
    teacher = load_teacher(config(kind), data, store)
    assert teacher.items.shape == (30, 8)
    assert teacher.users.shape == (40, 8)
    assert teacher.items.dtype == teacher.users.dtype == np.float32
    assert np.array_equal(np.sort(teacher.user_index), np.arange(40))
    assert np.array_equal(teacher.items.any(axis=1), data.train_counts() > 0)
    assert not teacher.items[28:].any()
    assert np.isfinite(teacher.items).all()
    assert np.isfinite(teacher.users).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_fitted_once(
    kind: type[TeacherConfig], store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(store)
    first = load_teacher(config(kind), data, store)
    monkeypatch.setattr(kind, "fit", None)
    assert load_teacher(config(kind), data, store).artifact.key == first.artifact.key


@pytest.mark.parametrize("kind", KINDS)
def test_two_fits_give_the_same_bytes(kind: type[TeacherConfig], tmp_path: object) -> None:
    found = [
        load_teacher(config(kind), dataset(one), one)
        for one in (ArtifactStore(f"{tmp_path}/a"), ArtifactStore(f"{tmp_path}/b"))
    ]
    assert found[0].items.tobytes() == found[1].items.tobytes()
    assert found[0].users.tobytes() == found[1].users.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_users_is_read(kind: type[TeacherConfig], store: ArtifactStore) -> None:
    small = config(kind)
    small.max_users = 10
    assert load_teacher(small, dataset(store), store).users.shape == (10, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_it_survives_its_mapping(kind: type[TeacherConfig]) -> None:
    first = config(kind)
    assert load_config(type(first), values=to_mapping(first)) == first


def test_a_bad_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.dim must be >= 1, got 0"):
        KINDS[0](dim=0)


def test_an_empty_train_part_is_refused(store: ArtifactStore) -> None:
    empty = write_dataset(
        store, Ragged.from_lists([], dtype=np.int32), item_ids=np.array(["a"]), name="empty"
    )
    with pytest.raises(DataError, match="must have train interactions"):
        load_teacher(KINDS[0](), empty, store)
