"""Published files are sorted into stages and parts by name."""

from __future__ import annotations

import re

import numpy as np
import pytest

from forge_ray.data.published import published_stages
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
        PublishedStage(1, (0,), (1,)),
        PublishedStage(2, (2,), (3,)),
    ]
    folders = ["s1_splits/part_01.csv", "s1_splits/part_02.csv", "test_data/s1_test.csv"]
    assert published_stages(PublishedConfig(), folders) == [PublishedStage(1, (0, 1), (2,))]
    # Those of `data export`, one folder per stage.
    ours = [f"s1/sequences/{part}/part_00001.csv" for part in ("test", "train", "validation")]
    assert published_stages(PublishedConfig(), ours) == [PublishedStage(1, (1,), (0, 2))]
    # "latest" and "is1" are other words.
    names = ["latest/s3.csv", "this1/s3-test.csv"]
    assert published_stages(PublishedConfig(), names) == [PublishedStage(3, (0,), (1,))]


def test_other_names_need_other_patterns() -> None:
    config = PublishedConfig(stage_pattern=r"week(\d+)", test_pattern="held")
    names = ["week2-held.parquet", "week2.parquet", "week10.parquet", "week10-held.parquet"]
    assert published_stages(config, names) == [
        PublishedStage(2, (1,), (0,)),
        PublishedStage(10, (2,), (3,)),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.csv"], "split.stage_pattern must find the stage in the name of every file, got none"),
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
    stage = PublishedStage(1, train=(0, 3), test=(2,))
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


def _require(part: SplitPart, wanted: list[int], rows: list[tuple[int, list[int], list[int]]]):
    assert part.rows.tolist() == wanted
    assert [one.tolist() for one in part.items] == [rows[r][1] for r in wanted]
    assert [one.tolist() for one in part.following] == [rows[r][2] for r in wanted]
