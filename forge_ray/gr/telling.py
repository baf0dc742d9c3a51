"""Rows of a training on their way to who watches it: each once, in order, none lost with a worker.

A worker writes a row to the run's history, reports it, and may be dead before Ray Train has fetched
it. The group that replaces it continues behind that row, and would never report it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import ray.train

from forge_ray.gr.checkpoint import HISTORY_FILE
from forge_ray.gr.health import is_measured
from forge_ray.gr.loop import reported
from forge_ray.gr.run_folder import FoundCheckpoint, RunFolder


def told_before(found: FoundCheckpoint) -> tuple[dict[str, Any], ...]:
    """Rows that whoever watched a run until this checkpoint was told, but for deaths."""
    history = found.manifest.progress.history if found.manifest else ()
    return tuple(row for row in history if is_measured(row))


def tell_again(found: FoundCheckpoint, callbacks: Sequence[ray.train.UserCallback]) -> None:
    """Repeats the rows before a checkpoint: who was told may have died before it took them up."""
    for row in told_before(found):
        # Outside of a run there is no context; the workers have not started.
        _tell(callbacks, cast(Any, None), reported(row))


class Telling(ray.train.UserCallback):
    """Passes the rows of one start of the workers on; lives in Ray Train's controller.

    Args:
        folder: Of the run.
        callbacks: Who is told; picklable.
        found: The checkpoint that the workers start from.
    """

    def __init__(
        self,
        folder: RunFolder,
        callbacks: Sequence[ray.train.UserCallback],
        found: FoundCheckpoint,
    ) -> None:
        self._folder, self._callbacks = folder, callbacks
        self._step = max((int(row["global_step"]) for row in told_before(found)), default=0)
        self._group: float | None = None

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Tells rank 0's row, unless it was told, and the missed ones before it."""
        row = metrics[0]
        missed = []
        if row["workers_started"] != self._group:
            self._group = row["workers_started"]
            written = self._folder.read_json(HISTORY_FILE) or []
            before = [one for one in written if one["global_step"] < row["global_step"]]
            missed = [reported(one) for one in before if is_measured(one)]
        for one in (*missed, row):
            if one["global_step"] > self._step:
                self._step = int(one["global_step"])
                _tell(self._callbacks, run_context, one)


def _tell(
    callbacks: Sequence[ray.train.UserCallback], run_context: Any, row: dict[str, Any]
) -> None:
    for callback in callbacks:
        callback.after_report(run_context, [row], None)
