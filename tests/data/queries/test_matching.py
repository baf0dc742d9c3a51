"""Which interaction a query led to: nearest, within a bound, and never out of a later day."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data.queries.matching import FAR, NEVER, NO_TIME, Reach, Taken, match_queries
from forge_ray.data.queries.rows import Asked
from forge_ray.data.ragged import Ragged

DAY = 100
STAGE = Reach(DAY, (0, 7 * DAY, 8 * DAY))
"""Seven train days and a held-out one; a query is within a day of its interaction."""


def taken(items: list[int], times: list[int] | None, user: int = 0) -> Taken:
    count = len(items)
    nothing = Ragged.from_lengths(np.empty(0, np.int32), np.zeros(count, np.int64))
    users = np.full(count, user, np.int64)
    asked = Asked(users, nothing, np.array(items, np.int64), np.arange(count))
    return Taken(asked, None if times is None else np.array(times, np.int64))


def places(asked: list[tuple[int, int]], parts: dict[str, Taken], reach: Reach) -> list[int]:
    """Places of queries of user 0 for (item, time)."""
    items, times = (np.array(one, np.int64) for one in zip(*asked, strict=True))
    return match_queries(np.zeros(len(asked), np.int64), items, times, parts, reach).tolist()


PARTS = {"train": taken([5, 6, 5], [DAY, 2 * DAY, 6 * DAY + 50]), "test": taken([7, 6], None)}


class TestStage:
    @pytest.mark.parametrize(
        ("item", "time", "place"),
        [
            (5, DAY - 1, 0),
            (5, 2 * DAY, 0),
            (5, 2 * DAY + 1, FAR),
            (5, 6 * DAY, 2),
            (5, 7 * DAY, FAR),  # within a day of the last one, but asked when train was over
            (7, 7 * DAY, 3),
            (7, 8 * DAY - 1, 3),  # however long ago the user's last train event was
            (7, 6 * DAY, 3),
            (7, 6 * DAY - 1, FAR),
            (6, 7 * DAY + 5, 4),
            (6, 2 * DAY + 5, 1),
            (8, 2 * DAY, NEVER),
            (5, NO_TIME, 2),
            (6, NO_TIME, 4),
        ],
    )
    def test_queries_stay_with_their_days(self, item, time, place):
        assert places([(item, time)], PARTS, STAGE) == [place]

    def test_new_users_have_held_out_items_too(self):
        assert places([(7, 7 * DAY)], {"test": taken([7], None)}, STAGE) == [0]

    def test_days_hold_what_lies_in_them(self):
        times = np.array([-1, 0, 7 * DAY, 8 * DAY - 1, 8 * DAY])
        assert STAGE.covers(times).tolist() == [False, True, True, True, False]
        assert STAGE.is_held_out(times).tolist() == [False, False, True, True, True]
        assert Reach(1).covers(times).all()
        assert not Reach(1).is_held_out(times).any()


def test_without_days_all_after_train_leads_to_what_was_held_out():
    parts = {"train": taken([5, 6], [100, 200]), "test": taken([7], None)}
    asked = [(7, 201), (7, 10**9), (7, 150), (7, 50), (5, 10**9), (5, 200)]
    assert places(asked, parts, Reach(100)) == [2, 2, 2, FAR, FAR, 0]
    assert places(asked, parts, Reach(None)) == [2, 2, 2, 2, 0, 0]
    assert places(asked, parts, Reach(0)) == [2, 2, FAR, FAR, FAR, FAR]


EVENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=8)


@given(EVENTS, EVENTS, st.integers(0, 20) | st.none())
def test_the_nearest_is_that_of_a_search_through_all(events, asked, most):
    events.sort(key=lambda one: one[1])
    part = taken([item for item, _ in events], [time for _, time in events])
    expected = []
    for item, time in asked:
        same = [(abs(t - time), -at) for at, (one, t) in enumerate(events) if one == item]
        near = [(away, at) for away, at in same if most is None or away <= most]
        expected.append(-min(near)[1] if near else FAR if same else NEVER)
    assert places(asked, {"train": part}, Reach(most)) == expected
