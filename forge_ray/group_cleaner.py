"""Frees the resources of a training whose controller was killed, and ends.

Tune stops a trial by killing its process, and the Train controller in it. Ray starts a detached
actor beside each controller that shall free the workers' resources then. In Ray 2.60 that actor
asks the State API whether the controller lives (no answer without a dashboard, or with several Rays
on one machine), and does not end afterwards: `ray.actor.exit_actor()` in a thread of its own only
ends the thread. Each pruned training would leave a process for as long as the cluster lives.

Apart from `trainer`: every training starts this process, and one without torch takes half the
memory. Private names of Ray: a test pins them.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from ray._private import state
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2._internal.execution.controller.placement_group_cleaner import (
    PlacementGroupCleaner,
)


class GroupCleaner(PlacementGroupCleaner):
    """Ray's cleaner, which asks the control service itself and really ends."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        placement_group_cleaner.is_actor_alive = _is_actor_alive  # of this process alone

    def _exit(self) -> None:
        if threading.current_thread() is self._monitor_thread:
            # Nobody waits for an answer: the controller, its only caller, is dead.
            os._exit(0)
        super()._exit()


def _is_actor_alive(actor_id: str, timeout: float) -> bool:
    found = state.actors(actor_id=actor_id)
    return bool(found) and found["State"] != "DEAD"
