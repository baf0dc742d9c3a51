"""Frees the resources of a training whose controller was killed, and ends.

Tune stops a trial by killing its process, and the Train controller in it. Ray starts a detached
actor beside each controller that shall free the workers' resources then. In Ray 2.60 that actor
asks the State API whether the controller lives (no answer without a dashboard, or with several Rays
on one machine), and does not end afterwards: `ray.actor.exit_actor()` in a thread of its own only
ends the thread. Each pruned training would leave a process for as long as the cluster lives. And it
knows of a placement group only once the workers in it have started: a trial that is lost before
would hold their resources until the job ends.

Apart from `trainer`: every training starts this process, and one without torch takes half the
memory. Private names of Ray: a test pins them.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray._private import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2._internal.execution.controller.placement_group_cleaner import (
    PlacementGroupCleaner,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group


class GroupCleaner(PlacementGroupCleaner):
    """Ray's cleaner, which asks the control service itself and really ends."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        placement_group_cleaner.is_actor_alive = _is_actor_alive  # of this process alone
        # The controller asks for it too, and may be dead before this process can hear it.
        self.start_monitoring()

    def _cleanup_placement_group(self, placement_group: PlacementGroup | None) -> None:
        """Frees what the controller made, whether or not it came to tell of it."""
        for group in _groups_of(self._controller_actor_id):
            remove_placement_group(group)

    def stop(self) -> None:
        """Ends the process in good order, asked by a controller that ends so.

        Ray's own fails: its thread forgets itself as it ends, and the method then asks for it.
        """
        self._stop_event.set()
        monitor = self._monitor_thread
        if monitor is not None:
            monitor.join(self._stop_timeout)
        ray.actor.exit_actor()

    def _exit(self) -> None:
        """Called by the monitor's thread as it ends."""
        if not self._stop_event.is_set():
            # Nobody waits for an answer: the controller, its only caller, is dead.
            os._exit(0)


def _is_actor_alive(actor_id: str, timeout: float) -> bool:
    found = state.actors(actor_id=actor_id)
    return bool(found) and found["State"] != "DEAD"


def _groups_of(actor_id: str) -> list[PlacementGroup]:
    """Placement groups that an actor made and that are still there."""
    told = state.state._connect_and_get_accessor().get_placement_group_table()
    found = [PlacementGroupTableData.FromString(one) for one in told]
    return [
        PlacementGroup(ray.PlacementGroupID(one.placement_group_id))
        for one in found
        if one.creator_actor_id.hex() == actor_id and one.state != PlacementGroupTableData.REMOVED
    ]
