"""Ray's `TorchTrainer` with a helper of ours, see `forge_ray.group_cleaner`.

Private names of Ray: a test pins them.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from forge_ray.group_cleaner import GroupCleaner

LONGEST_WAIT_S = 24 * 3600
"""Seconds that workers wait for each other before torch gives up. Whatever rank 0 does alone while
the others wait (a validation of wide beams above all) has to fit; Ray's half an hour would end the
run, and each of its restarts at the same place. Not needed for workers that died: Ray Train sees
those itself, within seconds."""


def torch_config(*, use_gpu: bool) -> TorchConfig:
    """How workers speak to each other."""
    return TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=LONGEST_WAIT_S)


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
