"""Splits: every event in its place, nothing from the future in train."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.config import load_config
from forge_ray.data.prepare import PrepareConfig
from forge_ray.data.ragged import Ragged
from forge_ray.data.splits import (
    StageDays,
    Targets,
    TemporalConfig,
    leave_one_out,
    stage_days,
    temporal,
)
from forge_ray.errors import ConfigError, DataError

LOGS = st.lists(
    st.lists(st.tuples(st.integers(0, 59), st.integers(0, 9)), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


def ragged(log: list[list[tuple[int, int]]], field: int) -> Ragged:
    return Ragged.from_lists([[e[field] for e in sorted(user)] for user in log], dtype=np.int64)


@settings(deadline=None)
@given(log=LOGS)
def test_leave_one_out_gives_every_event_one_place(log: list[list[tuple[int, int]]]) -> None:
    times, items = ragged(log, 0), ragged(log, 1)
    splits = leave_one_out(items, times)
    assert splits.train.rows.tolist() == list(range(len(log)))
    held_out = {int(row): place for place, row in enumerate(splits.test.rows)}
    for row, whole in enumerate(items):
        train = splits.train.items.row(row).tolist()
        if len(whole) < 3:
            assert train == whole.tolist()
            assert row not in held_out
            continue
        place = held_out[row]
        assert train == whole[:-2].tolist()
        assert splits.train.following.row(row).tolist() == times.row(row)[:-2].tolist()
        for part, cut in ((splits.validation, -2), (splits.test, -1)):
            assert part.items.row(place).tolist() == whole[:cut].tolist()
            assert part.following.row(place).tolist() == [whole[cut]]


@settings(deadline=None)
@given(
    log=LOGS,
    first=st.integers(0, 3),
    length=st.integers(1, 3),
    targets=st.sampled_from(["all", "last", "each"]),
)
def test_temporal_leaks_no_event(
    log: list[list[tuple[int, int]]], first: int, length: int, targets: Targets
) -> None:
    times, items = ragged(log, 0), ragged(log, 1)
    days = StageDays(first, first + length, first + length + 1)
    is_validation = np.arange(len(log)) % 2 == 0
    splits = temporal(
        items, times, days=days, ticks_per_day=10, is_validation=is_validation, targets=targets
    )
    assert (splits.train.following.values // 10 < days.end).all()
    assert not set(splits.validation.rows) & set(splits.test.rows)
    for part, wanted in ((splits.validation, True), (splits.test, False)):
        expected = []
        for row, (whole, time) in enumerate(zip(items, times, strict=True)):
            day = time // 10
            history = whole[(day >= days.first) & (day < days.end)].tolist()
            following = whole[day == days.end].tolist()
            ends = {
                "all": [len(following)],
                "last": [len(following)],
                "each": range(1, len(following) + 1),
            }
            for end in ends[targets]:
                before, after = history, following
                if targets != "all":
                    before, after = [*history, *following[: end - 1]], following[end - 1 : end]
                if is_validation[row] == wanted and before and after:
                    expected.append((row, before, after))
        got = zip(part.rows, part.items, part.following, strict=True)
        assert [(int(r), i.tolist(), t.tolist()) for r, i, t in got] == expected


def test_stages_are_consecutive_and_end_with_the_log() -> None:
    config = TemporalConfig(num_stages=3, stage_days=5)
    days = stage_days(config, first_timestamp=0, last_timestamp=199, ticks_per_day=10)
    assert days == [StageDays(4, 9, 10), StageDays(9, 14, 15), StageDays(14, 19, 20)]
    with pytest.raises(DataError, match=r"needs 16 days from day 9 .* days 0 to 19"):
        stage_days(
            TemporalConfig(num_stages=3, stage_days=5, first_day=9),
            first_timestamp=0,
            last_timestamp=199,
            ticks_per_day=10,
        )


def test_split_switches_by_kind_and_checks_ranges() -> None:
    config = load_config(PrepareConfig, overrides=["split.kind=temporal", "split.num_stages=3"])
    assert isinstance(config.split, TemporalConfig)
    assert config.split.num_stages == 3
    with pytest.raises(ConfigError, match=r"split\.stage_days must be >= 1, got 0"):
        TemporalConfig(stage_days=0)
