"""Which interaction a logged query led to.

Pure array functions; knows nothing about files or Ray.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forge_ray.data.queries.rows import Asked
from forge_ray.data.ragged import Ragged

NO_TIME = -1
NEVER = -1
"""The user never took the item."""
FAR = -2
"""The user took the item, but at no time that the query may have led to."""
_FOREVER = 2**62


@dataclass(frozen=True)
class Taken:
    """What some users took in one split.

    Attributes:
        asked: one moment for each interaction.
        times: int64 [R]; None for held-out ones, of which a dataset keeps no time.
    """

    asked: Asked
    times: NDArray[np.int64] | None

    @classmethod
    def nothing(cls) -> Taken:
        """A split without these users."""
        none = np.empty(0, np.int64)
        return cls(
            Asked(none, Ragged(np.empty(0, np.int32), np.zeros(1, np.int64)), none, none), none
        )


@dataclass(frozen=True)
class Reach:
    """Which interactions a query may have led to, in ticks of the dataset's times.

    Attributes:
        most: largest distance between a query and its interaction; None for any.
        days: first tick of the train days, of the held-out days, and behind those, where the
            dataset was split by time.
    """

    most: float | None = None
    days: tuple[int, int, int] | None = None

    def covers(self, times: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the dataset's days hold each time, bool [R]; any where it has none."""
        if self.days is None:
            return np.ones(len(times), dtype=bool)
        first, _, behind = self.days
        return (times >= first) & (times < behind)

    def is_held_out(self, times: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each time is known to be of the held-out days, bool [R]."""
        if self.days is None:
            return np.zeros(len(times), dtype=bool)
        return np.asarray(times >= self.days[1])

    def held_out_span(self, last_in_train: int) -> tuple[int, int]:
        """First and last tick at which a user's held-out interactions may have been."""
        if self.days is None:
            return last_in_train + 1, _FOREVER
        return self.days[1], self.days[2] - 1

    def nearest(self, moments: Sequence[_Moment], time: int) -> int:
        """Number of the moment that a query at this time led to, or `FAR`."""
        if self.days is not None and time >= self.days[1]:
            # Train ends before the held-out days, so its queries must too.
            moments = [one for one in moments if one.last >= self.days[1]]
        # Later moments first, so that the last of equally near ones is met first.
        near = min(reversed(moments), key=lambda one: one.distance(time), default=None)
        if near is None or (self.most is not None and near.distance(time) > self.most):
            return FAR
        return near.number


class _Moment(NamedTuple):
    """An interaction: the first and last tick at which it may have been, and its number."""

    first: int
    last: int
    number: int

    def distance(self, time: int) -> int:
        return max(self.first - time, time - self.last, 0)


def match_queries(
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    times: NDArray[np.int64],
    parts: Mapping[Any, Taken],
    reach: Reach,
) -> NDArray[np.int64]:
    """The interaction of the same user and item that is nearest in time, and within reach.

    Held-out interactions may have been at any time of the held-out days, or where there are no such
    days, at any time after the user's last in train. Queries of the held-out days led to none in
    train. Of equally near ones, and for queries without a time, the last is taken.

    Args:
        users: int64 [R].
        items: int64 [R].
        times: int64 [R], `NO_TIME` where it is not known.
        parts: of the same users.
        reach: which interactions a query may have led to.

    Returns:
        int64 [R], number of the moment counted over all parts in order; `NEVER` or `FAR` where
        there is none.
    """
    known = _moments(parts, reach)
    found = np.full(len(users), NEVER, np.int64)
    for row, key in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        moments = known.get(key)
        if not moments:
            continue
        time = int(times[row])
        found[row] = moments[-1].number if time == NO_TIME else reach.nearest(moments, time)
    return found


def _moments(parts: Mapping[Any, Taken], reach: Reach) -> dict[tuple[int, int], list[_Moment]]:
    """Every moment by user and item, in order."""
    last: dict[int, int] = {}
    for part in parts.values():
        if part.times is not None:
            for user, time in zip(part.asked.user_index.tolist(), part.times.tolist(), strict=True):
                last[user] = max(last.get(user, time), time)
    known: dict[tuple[int, int], list[_Moment]] = defaultdict(list)
    number = 0
    for part in parts.values():
        users, items = part.asked.user_index.tolist(), part.asked.targets.tolist()
        for row, (user, item) in enumerate(zip(users, items, strict=True)):
            if part.times is None:
                span = reach.held_out_span(last.get(user, -1))
            else:
                span = (int(part.times[row]), int(part.times[row]))
            known[user, item].append(_Moment(*span, number))
            number += 1
    return known
