"""Ray's `TorchTrainer`, less what it leaves behind when its controller is killed.

Tune stops a trial by killing its process, and the Train controller in it. Ray starts a detached
actor beside each controller that shall free the workers' resources then. In Ray 2.60 that actor
asks the State API whether the controller lives (no answer without a dashboard, or with several Rays
on one machine), and does not end afterwards: `ray.actor.exit_actor()` in a thread of its own only
ends the thread. Each pruned training would leave a process for as long as the cluster lives.

Private names of Ray: a test pins them.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private import state
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2._internal.execution.controller.placement_group_cleaner import (
    PlacementGroupCleaner,
)


class ForgeTrainer(TorchTrainer):
    """A `TorchTrainer` whose helper actor ends with its controller."""

    def _create_default_callbacks(self) -> list[Any]:
        return [
            GroupCleanerCallback() if isinstance(one, PlacementGroupCleanerCallback) else one
            for one in super()._create_default_callbacks()
        ]


class GroupCleanerCallback(PlacementGroupCleanerCallback):
    """Starts our cleaner instead of Ray's; stops it in the same way."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller."""
        self._controller_actor_id = ray.get_runtime_context().get_actor_id()
        self._cleaner = (
            ray.remote(GroupCleaner)
            .options(
                num_cpus=0,
                lifetime="detached",
                # Nodes that are lost together with a controller do not hold it.
                resources={HEAD_NODE_RESOURCE_NAME: 0.001},
                # Not inside the placement group of the trial.
                scheduling_strategy="DEFAULT",
            )
            .remote(
                controller_actor_id=self._controller_actor_id,
                check_interval_s=self._check_interval_s,
                get_actor_timeout_s=self._get_actor_timeout_s,
                stop_timeout=self._stop_timeout,
            )
        )
        self._cleaner.start_monitoring.remote()


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
