"""Which interaction a logged query led to.

Pure array functions; knows nothing about files or Ray.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_ray.data.queries.rows import Asked
from forge_ray.data.ragged import Ragged

NO_TIME = -1


@dataclass(frozen=True)
class Taken:
    """What some users took in one split.

    Attributes:
        asked: one moment for each interaction.
        times: int64 [R]; None for held-out ones, which follow all that is in train.
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


def match_queries(
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    times: NDArray[np.int64],
    parts: Mapping[Any, Taken],
) -> NDArray[np.int64]:
    """The interaction of the same user and item that is nearest in time.

    Held-out interactions count as one tick after the user's last in train; of equally near ones,
    and for queries without a time, the last is taken.

    Args:
        users: int64 [R].
        items: int64 [R].
        times: int64 [R], `NO_TIME` where it is not known.
        parts: of the same users.

    Returns:
        int64 [R], number of the moment counted over all parts in order; -1 where there is none.
    """
    known = _moments(parts)
    found = np.full(len(users), -1, np.int64)
    for row, key in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        moments = known.get(key)
        if not moments:
            continue
        time = int(times[row])
        if time == NO_TIME:
            found[row] = moments[-1][1]
        else:
            # Later moments first, so that the last of equally near ones is met first.
            found[row] = min(reversed(moments), key=lambda one: abs(one[0] - time))[1]
    return found


def _moments(parts: Mapping[Any, Taken]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Time and number of every moment by user and item, in order."""
    last: dict[int, int] = {}
    for part in parts.values():
        if part.times is not None:
            for user, time in zip(part.asked.user_index.tolist(), part.times.tolist(), strict=True):
                last[user] = max(last.get(user, time), time)
    known: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    number = 0
    for part in parts.values():
        users, items = part.asked.user_index.tolist(), part.asked.targets.tolist()
        for row, (user, item) in enumerate(zip(users, items, strict=True)):
            time = last.get(user, -1) + 1 if part.times is None else int(part.times[row])
            known[user, item].append((time, number))
            number += 1
    return known
