"""How users' ordered histories become train, validation and test: pure array functions.

Knows Ragged histories and times. Knows nothing of files, Ray or vectors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from forge_ray.config import Component
from forge_ray.data.ragged import Ragged
from forge_ray.data.sequences import are_targets, files_of, places_of
from forge_ray.errors import ConfigError, DataError

MIN_EVENTS = 3
Targets: TypeAlias = Literal["all", "last", "each"]


@dataclass(kw_only=True)
class SplitConfig(Component):
    """How to hold out validation and test."""

    kind: str = "leave_one_out"


@dataclass(kw_only=True)
class LeaveOneOutConfig(SplitConfig):
    """Last item of each user for test, the one before for validation; needs no absolute time.

    Users with fewer than 3 events are train only. Source: the protocol of S3-Rec, P5 and TIGER.
    """

    kind: Literal["leave_one_out"] = "leave_one_out"


@dataclass(kw_only=True)
class TemporalConfig(SplitConfig):
    """Stages of consecutive days; the days after a stage are its held-out part.

    Source: FORGE (arXiv 2509.20904), stages S1, S2, S3 with the next day's users as test. We split
    those users by a hash into validation and test, so that selection never sees test.
    """

    kind: Literal["temporal"] = "temporal"
    num_stages: int = 1
    """Stages; stage k + 1 begins where the train days of stage k end."""
    stage_days: int = 7
    """Train days of one stage."""
    test_days: int = 1
    """Days after the stage whose events are the targets."""
    first_day: int | None = None
    """First train day of stage 1 as days since time 0; by default such that the log's last day is
    the last held-out day."""
    targets: Targets = "all"
    """`all`: a user's events of the train days are the history, all of the held-out days the
    targets, as FORGE evaluates. `last`: the last event is the target and all before it, held-out
    days included, the history, as a model that was trained days ago meets users; also those who are
    new, so that few returning users leave enough rows. `each`: as `last`, in a row of its own for
    every held-out event. Active users count for as many rows, and intervals are over users. Rows
    grow with the square of a user's events."""
    validation_share: float = 0.5
    """Share of the held-out users that go to validation, the rest to test."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("num_stages", "stage_days", "test_days"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"split.{name} must be >= 1, got {getattr(self, name)}. "
                    f"Set split.{name} to a number of {'stages' if 'num' in name else 'days'}."
                )
        _check_share(self.validation_share)


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ConfigError(
            f"split.validation_share must be between 0 and 1, got {share}. Use 0.5 for equal parts."
        )


@dataclass(kw_only=True)
class PublishedConfig(SplitConfig):
    """Stages and held-out rows as the files of sequences were published: FORGE's S1, S2 and S3.

    A row of a stage's train files is a train user with all its items; one of its test files is a
    held-out user, its `history` and `targets` taken as they are. Held-out rows without a history or
    without targets, also those that lose them with items left out, are in no part and are counted
    (`sequences.LOSSES`). Where a stage has no files for validation, as FORGE's, its test rows are
    split by a hash, so that selection never sees test. Needs `interactions.layout=sequences`.
    """

    kind: Literal["published"] = "published"
    stage_pattern: str = r"(?:^|[/_.-])s(\d+)(?=[/_.-])"
    """Regular expression that finds the stage in a file's name, of imported files with the folders
    they lay in; the first group is the number. The default reads `s1_splits/part_01.csv` and
    `s2_tiny_test.csv`."""
    test_pattern: str = r"(?i)(?:^|[/_.-])test\d*(?=[/_.-])"
    """Regular expression that is found in the names of test files and of no others."""
    validation_pattern: str = r"(?i)(?:^|[/_.-])(?:validation|valid|val)\d*(?=[/_.-])"
    """The same for validation files; all that are neither are trained on."""
    validation_share: float = 0.5
    """Share of the test rows that go to validation in stages without validation files."""

    def __post_init__(self) -> None:
        """Check the patterns and the share."""
        patterns = {"stage_pattern": 1, "test_pattern": 0, "validation_pattern": 0}
        for name, groups in patterns.items():
            pattern = getattr(self, name)
            try:
                has = re.compile(pattern).groups
            except re.error as error:
                raise ConfigError(
                    f"split.{name} must be a regular expression, got {pattern!r}: {error}. "
                    "Correct it."
                ) from error
            if has < groups:
                raise ConfigError(
                    f"split.{name} must have a group around the stage's number, got {pattern!r}. "
                    r"Write for example stage(\d+)."
                )
        _check_share(self.validation_share)


@dataclass(frozen=True, slots=True)
class PublishedStage:
    """The files of one published stage.

    Attributes:
        number: the stage's.
        train: numbers of the files whose rows are trained on.
        validation: numbers of the files for validation; none where it comes out of `test`.
        test: numbers of the files whose rows are held out.
    """

    number: int
    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageDays:
    """Day range of one temporal stage, as days since time 0.

    Train events lie in ``[first, end)``, held-out events in ``[end, held_out_end)``.
    """

    first: int
    end: int
    held_out_end: int


@dataclass(frozen=True, slots=True)
class SplitPart:
    """Some users of one split.

    Attributes:
        rows: ``[B]`` int64 places of the users in the input; several of one user with
            ``targets="each"``.
        items: B histories.
        following: B lists: the times of the items in train, the targets elsewhere.
    """

    rows: NDArray[np.int64]
    items: Ragged
    following: Ragged


@dataclass(frozen=True, slots=True)
class Splits:
    """All three parts of one stage."""

    train: SplitPart
    validation: SplitPart
    test: SplitPart


def leave_one_out(items: Ragged, times: Ragged) -> Splits:
    """Cut the last two items off each history that has at least 3.

    Args:
        items: histories of B users in time order.
        times: their times, of the same lengths.
    """
    lengths = items.lengths
    held_out = np.flatnonzero(lengths >= MIN_EVENTS)
    cut = np.where(lengths >= MIN_EVENTS, lengths - 2, lengths)
    every = np.arange(len(items), dtype=np.int64)
    starts, ends = items.offsets[held_out], items.offsets[held_out + 1]
    one = np.ones(len(held_out), dtype=np.int64)
    return Splits(
        SplitPart(
            every, items.slices(items.offsets[:-1], cut), times.slices(times.offsets[:-1], cut)
        ),
        SplitPart(held_out, items.slices(starts, ends - starts - 2), items.slices(ends - 2, one)),
        SplitPart(held_out, items.slices(starts, ends - starts - 1), items.slices(ends - 1, one)),
    )


def temporal(
    items: Ragged,
    times: Ragged,
    *,
    days: StageDays,
    ticks_per_day: int,
    is_validation: NDArray[np.bool_],
    targets: Targets = "all",
) -> Splits:
    """Cut one stage out of the histories by time.

    Held-out users are those with events in the held-out days and at least one before: in the train
    days, or with ``targets`` of ``"last"`` and ``"each"`` anywhere in the stage.

    Args:
        items: histories of B users in time order.
        times: their times, of the same lengths.
        days: the stage.
        ticks_per_day: length of a day in the unit of the times.
        is_validation: ``[B]`` users that go to validation if they are held out.
        targets: see `TemporalConfig.targets`.
    """
    day = times.values // ticks_per_day
    in_train = (day >= days.first) & (day < days.end)
    in_target = (day >= days.end) & (day < days.held_out_end)
    train = items.filter(in_train)
    trained = np.flatnonzero(train.lengths > 0)
    if targets == "all":
        held = items.filter(in_target)
        returned = np.flatnonzero((train.lengths > 0) & (held.lengths > 0))
        held_out = SplitPart(returned, train.take(returned), held.take(returned))
    else:
        seen = items.filter(in_train | in_target)
        held_out = _rolling(seen, in_target[in_train | in_target], only_last=targets == "last")
    goes = is_validation[held_out.rows]
    return Splits(
        SplitPart(trained, train.take(trained), times.filter(in_train).take(trained)),
        _rows_of(held_out, goes),
        _rows_of(held_out, ~goes),
    )


def published(
    items: Ragged, times: Ragged, *, stage: PublishedStage, is_validation: NDArray[np.bool_]
) -> Splits:
    """Take one stage out of rows that were published as train and test.

    Args:
        items: B rows, each a history and its targets.
        times: their marks, see `sequences.events_of`; no row is empty.
        stage: which files are of which part.
        is_validation: ``[B]`` rows that go to validation if they are held out and the stage has no
            files for it.
    """
    file = files_of(times.values[times.offsets[:-1]])
    trained = np.flatnonzero(np.isin(file, stage.train))
    is_target = are_targets(times.values)
    histories, targets = items.filter(~is_target), items.filter(is_target)
    is_held = np.isin(file, (*stage.validation, *stage.test))
    held = np.flatnonzero(is_held & (histories.lengths > 0) & (targets.lengths > 0))
    held_out = SplitPart(held, histories.take(held), targets.take(held))
    goes = np.isin(file, stage.validation) if stage.validation else is_validation
    goes = goes[held]
    return Splits(
        SplitPart(trained, items.take(trained), places(times).take(trained)),
        _rows_of(held_out, goes),
        _rows_of(held_out, ~goes),
    )


def places(times: Ragged) -> Ragged:
    """Times of sequences without their marks: the place of each event in its row."""
    return Ragged(places_of(times.values), times.offsets)


def _rolling(seen: Ragged, is_target: NDArray[np.bool_], *, only_last: bool) -> SplitPart:
    """A row for each target that has events before it: those, and it alone."""
    place = seen.positions
    wanted = is_target & (place > 0)
    if only_last:
        wanted &= place == np.repeat(seen.lengths - 1, seen.lengths)
    ends = np.flatnonzero(wanted)
    histories = seen.slices(ends - place[ends], place[ends])
    return SplitPart(
        seen.row_ids[ends], histories, seen.slices(ends, np.ones(len(ends), dtype=np.int64))
    )


def _rows_of(part: SplitPart, mask: NDArray[np.bool_]) -> SplitPart:
    return SplitPart(part.rows[mask], part.items.take(mask), part.following.take(mask))


def stage_days(
    config: TemporalConfig, *, first_timestamp: int, last_timestamp: int, ticks_per_day: int
) -> list[StageDays]:
    """Place the stages on the log's days.

    Raises:
        DataError: the log does not cover the days asked for.
    """
    first, last = first_timestamp // ticks_per_day, last_timestamp // ticks_per_day
    needed = config.num_stages * config.stage_days + config.test_days
    start = last + 1 - needed if config.first_day is None else config.first_day
    if start < first or start + needed > last + 1:
        raise DataError(
            f"split needs {needed} days from day {start} on ({config.num_stages} stages of "
            f"{config.stage_days} days and {config.test_days} after them), got a log of days "
            f"{first} to {last}. Shorten the stages, or set split.first_day within the log."
        )
    starts = [start + stage * config.stage_days for stage in range(config.num_stages)]
    return [
        StageDays(s, s + config.stage_days, s + config.stage_days + config.test_days)
        for s in starts
    ]
