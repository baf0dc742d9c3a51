"""Parts cover a split once and read exactly their rows."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data import parts
from forge_ray.data.parts import plan_parts, read_part
from tests.evaluate.datasets import topic_dataset
from tests.gr.datasets import tiny_dataset


def test_parts_read_exactly_their_rows(store: ArtifactStore) -> None:
    dataset = tiny_dataset(store)  # three shards of 30 users
    found = list(plan_parts(dataset, "test", rows_per_part=11))
    users = [read_part(dataset, part).user_index.tolist() for part in found]
    assert [len(one) for one in users] == [11, 11, 8] * 3
    assert [user for one in users for user in one] == list(range(90))
    assert sorted(part.name for part in found) == [part.name for part in found]
    assert len({part.name for part in found}) == 9


def test_a_limit_takes_the_first_users(store: ArtifactStore) -> None:
    dataset = tiny_dataset(store)
    found = list(plan_parts(dataset, "test", rows_per_part=20, limit=45))
    assert [part.rows for part in found] == [20, 10, 15]
    first = next(dataset.sequence_batches("test", limit=45))
    assert read_part(dataset, found[0]).items == first.items.take(range(20))


def test_no_footer_is_read_behind_the_limit(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tiny_dataset(store)  # three shards of 30 users
    read, metadata = [], pq.read_metadata
    monkeypatch.setattr(
        parts.pq, "read_metadata", lambda path, **kw: read.append(path) or metadata(path, **kw)
    )
    assert [part.rows for part in plan_parts(dataset, "test", rows_per_part=30, limit=30)] == [30]
    assert len(read) == 1


def test_train_parts_have_no_targets(store: ArtifactStore) -> None:
    dataset = topic_dataset(store, num_users=50)
    (part,) = plan_parts(dataset, "train", rows_per_part=100)
    assert read_part(dataset, part).targets is None
