"""Published files are sorted into stages and parts by name."""

from __future__ import annotations

import re

import numpy as np
import pytest

from forge_ray.data.importers import RawFile, sequence_prefix
from forge_ray.data.published import published_stages, sequence_shards
from forge_ray.data.ragged import Ragged
from forge_ray.data.splits import PublishedConfig, PublishedStage, SplitPart, published
from forge_ray.errors import ConfigError, DataError

TINY = [
    "origin_behavior/s1_tiny.csv",
    "origin_behavior/s1_tiny_test.csv",
    "origin_behavior/s2_tiny.csv",
    "origin_behavior/s2_tiny_test.csv",
]


def test_the_default_patterns_read_published_names() -> None:
    assert published_stages(PublishedConfig(), TINY) == [
        PublishedStage(1, (0,), (), (1,)),
        PublishedStage(2, (2,), (), (3,)),
    ]
    folders = ["s1_splits/part_01.csv", "s1_splits/part_02.csv", "test_data/s1_test.csv"]
    assert published_stages(PublishedConfig(), folders) == [PublishedStage(1, (0, 1), (), (2,))]
    # Those of `data export`, one folder per stage.
    ours = [f"s1/sequences/{part}/part_00001.csv" for part in ("test", "train", "validation")]
    assert published_stages(PublishedConfig(), ours) == [PublishedStage(1, (1,), (2,), (0,))]
    # Numbered and written otherwise, a test file is no train file.
    shouted = ["s1_train.csv", "s1_test.csv", "s1_test2.csv", "s1_TEST_b.csv"]
    assert published_stages(PublishedConfig(), shouted) == [PublishedStage(1, (0,), (), (1, 2, 3))]
    # "latest" and "is1" are other words.
    names = ["latest/s3.csv", "this1/s3-test.csv"]
    assert published_stages(PublishedConfig(), names) == [PublishedStage(3, (0,), (), (1,))]


def test_other_names_need_other_patterns() -> None:
    config = PublishedConfig(stage_pattern=r"week(\d+)", test_pattern="held")
    names = ["week2-held.parquet", "week2.parquet", "week10.parquet", "week10-held.parquet"]
    assert published_stages(config, names) == [
        PublishedStage(2, (1,), (), (0,)),
        PublishedStage(10, (2,), (), (3,)),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.csv"], "split.stage_pattern must find the stage in the name of every file, got none"),
        (["s_a.csv"], "split.stage_pattern must find the stage"),
        (TINY[:3], "stage 2 must have a file to test on, got ['origin_behavior/s2_tiny.csv']"),
        (TINY[1:], "stage 1 must have a file to train on"),
    ],
)
def test_what_cannot_be_sorted_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        published_stages(PublishedConfig(), names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_pattern": "s("}, "split.stage_pattern must be a regular expression"),
        ({"stage_pattern": r"s\d"}, "must have a group around the stage's number"),
        ({"validation_share": 1.0}, "split.validation_share must be between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        PublishedConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_rows_go_where_their_files_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(60):
        history, targets = (rng.integers(0, 50, rng.integers(0, 4)).tolist() for _ in range(2))
        if history or targets:
            rows.append((int(rng.integers(0, 4)), history, targets))
    items = Ragged.from_lists([[*history, *targets] for _, history, targets in rows])
    marks = [
        [(file << 40) | (int(place >= len(history)) << 39) | place for place in range(size)]
        for file, history, targets in rows
        for size in [len(history) + len(targets)]
    ]
    goes = rng.random(len(rows)) < 0.5
    stage = PublishedStage(1, train=(0, 3), validation=(), test=(2,))
    found = published(items, Ragged.from_lists(marks), stage=stage, is_validation=goes)

    train = [row for row, one in enumerate(rows) if one[0] in (0, 3)]
    assert found.train.rows.tolist() == train
    assert [one.tolist() for one in found.train.items] == [rows[r][1] + rows[r][2] for r in train]
    assert [one.tolist() for one in found.train.following] == [
        list(range(len(rows[r][1]) + len(rows[r][2]))) for r in train
    ]
    for part, wanted in ((found.validation, True), (found.test, False)):
        kept = [r for r, (file, h, t) in enumerate(rows) if file == 2 and h and t]
        _require(part, [r for r in kept if goes[r] == wanted], rows)


def test_validation_files_are_taken_as_they_are() -> None:
    items = Ragged.from_lists([[1, 2], [3, 4], [5, 6]])
    marks = [[(file << 40), (file << 40) | (1 << 39) | 1] for file in range(3)]
    stage = PublishedStage(1, train=(0,), validation=(1,), test=(2,))
    goes = np.array([False, False, True])
    found = published(items, Ragged.from_lists(marks), stage=stage, is_validation=goes)
    parts = (found.train, found.validation, found.test)
    assert [part.rows.tolist() for part in parts] == [[0], [1], [2]]


def shard(name: str) -> RawFile:
    return RawFile(name, "parquet", 0, 0)


def test_shards_of_own_files_are_the_files() -> None:
    uris = ["s3://b/x/s1.train.parquet?region=q", "s3://b/x/s1.test.parquet?region=q"]
    found = sequence_shards("/nowhere/x", [shard(uri) for uri in uris])
    assert found.names == ("s1.test.parquet", "s1.train.parquet")
    assert [file.origin for file in found.shards] == [1, 0]
    assert [sequence_prefix(file) for file in found.shards] == ["s1.train", "s1.test"]
    with pytest.raises(DataError, match="their users would be the same"):
        sequence_shards("/nowhere/x", [shard("/x/part-s1.parquet"), shard("/x/s1.parquet")])


def _require(part: SplitPart, wanted: list[int], rows: list[tuple[int, list[int], list[int]]]):
    assert part.rows.tolist() == wanted
    assert [one.tolist() for one in part.items] == [rows[r][1] for r in wanted]
    assert [one.tolist() for one in part.following] == [rows[r][2] for r in wanted]
