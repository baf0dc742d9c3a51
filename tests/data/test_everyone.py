"""Every user once with all events, whatever the split did to them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pyarrow.dataset as pads
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data import everyone
from forge_ray.data.everyone import plan_everyone, read_everyone
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.data.splits import Targets
from tests.data.split_datasets import (
    STAGE,
    leave_one_out_cut,
    random_log,
    split_dataset,
    temporal_cut,
)


def everyone_in(dataset: Dataset, rows_per_part: int = 7) -> dict[int, list[int]]:
    """User index → whole history; no user may come twice."""
    found: dict[int, list[int]] = {}
    for part in plan_everyone(dataset, rows_per_part=rows_per_part):
        batch = read_everyone(dataset, part)
        assert batch.targets is None
        assert len(batch) <= part.rows <= rows_per_part
        assert not set(batch.user_index.tolist()) & set(found)
        found |= {
            user: items.tolist()
            for user, items in zip(batch.user_index.tolist(), batch.items, strict=True)
        }
    return found


def within(items: Ragged, times: Ragged, first: int, end: int) -> list[list[int]]:
    return [
        row[(days >= first) & (days < end)].tolist() for row, days in zip(items, times, strict=True)
    ]


@pytest.mark.parametrize("rows_per_part", [1, 7, 1000])
def test_the_last_events_come_back_behind_the_others(
    store: ArtifactStore, rows_per_part: int
) -> None:
    items, times = random_log()
    assert items.lengths.min() < 3  # in train alone
    dataset = split_dataset(store, items, times, leave_one_out_cut, name="loo")
    expected = {user: row.tolist() for user, row in enumerate(items)}
    assert everyone_in(dataset, rows_per_part) == expected


@pytest.mark.parametrize("targets", get_args(Targets))
@pytest.mark.parametrize("rows_per_part", [7, 1000])
def test_a_stage_gives_what_it_holds(
    store: ArtifactStore, targets: Targets, rows_per_part: int
) -> None:
    items, times = random_log()
    dataset = split_dataset(store, items, times, temporal_cut(targets), name=targets)
    train = within(items, times, STAGE.first, STAGE.end)
    whole = within(items, times, STAGE.first, STAGE.held_out_end)
    # Held-out events without any before them are in no row of the dataset.
    expected = {
        user: row
        for user, row in enumerate(whole)
        if train[user] or (targets != "all" and len(row) > 1)
    }
    assert len(expected) < len(items)
    assert any(expected[user] != train[user] for user in expected)
    assert everyone_in(dataset, rows_per_part) == expected


def test_a_limit_takes_the_first_users(store: ArtifactStore) -> None:
    items, times = random_log()
    dataset = split_dataset(store, items, times, leave_one_out_cut, name="loo")  # shards of 20
    found = list(plan_everyone(dataset, rows_per_part=15, limit=30))
    assert [part.rows for part in found] == [15, 5, 10]
    users = np.concatenate([read_everyone(dataset, part).user_index for part in found])
    assert users.tolist() == list(range(30))


def test_a_part_without_events_is_empty(store: ArtifactStore) -> None:
    items, times = random_log(num_users=9)
    late = Ragged(times.values + 100, times.offsets)
    dataset = split_dataset(store, items, late, temporal_cut("all"), name="late")
    batches = [read_everyone(dataset, part) for part in plan_everyone(dataset, rows_per_part=9)]
    assert [len(batch) for batch in batches] == [0, 0, 0]


def test_a_part_reads_its_own_shards_alone(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, times = random_log()
    dataset = split_dataset(store, items, times, leave_one_out_cut, name="loo")
    part = list(plan_everyone(dataset, rows_per_part=20))[1]
    opened: list[str] = []
    real = pads.dataset
    monkeypatch.setattr(
        everyone.pads, "dataset", lambda paths, **kw: opened.extend(paths) or real(paths, **kw)
    )
    read_everyone(dataset, part)
    assert [path.rsplit("/", 2)[1:] for path in opened] == [
        ["train", "part-1.parquet"],
        ["validation", "part-1.parquet"],
        ["test", "part-1.parquet"],
    ]
