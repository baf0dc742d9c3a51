"""Frees what a stopped training held: the placement group of its workers.

Tune stops a trial by killing its process, and the Train controller dies with it, abruptly. Ray's
own cleaner asks the State API whether the controller lives; without a dashboard, or with several
Rays on one machine, it never gets an answer, the workers' CPUs stay reserved and the sweep stands
still. The sweep therefore removes the group itself, by the id that every training row carries.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""Seconds for Tune to kill the trial first: a live controller would replace lost workers."""


def remove_group(group_id: str) -> None:
    """Removes a placement group by its hexadecimal id, if it is still there."""
    group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
    if placement_group_table(group).get("state", "REMOVED") != "REMOVED":
        logger.debug("freeing placement group %s", group_id)
        remove_placement_group(group)


class StoppedGroups:
    """Groups of stopped trainings, each removed once its grace is over."""

    def __init__(
        self,
        remove: Callable[[str], None] = remove_group,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remove = remove
        self._clock = clock
        self._due: dict[str, float] = {}

    def add(self, group_id: str) -> None:
        """Notes that the training with this group was told to stop."""
        self._due[group_id] = self._clock() + GRACE_S

    def free_due(self) -> None:
        """Removes the groups whose grace is over."""
        for group_id in [one for one, due in self._due.items() if due <= self._clock()]:
            del self._due[group_id]
            self._remove(group_id)

    def free_all(self) -> None:
        """Removes the rest, after their grace."""
        if self._due:
            time.sleep(max(0.0, max(self._due.values()) - self._clock()))
        self.free_due()
