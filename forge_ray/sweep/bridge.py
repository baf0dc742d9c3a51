"""Rows of a nested Ray Train run, carried into the Tune trial that started it.

Train reports in its controller process, Tune listens in the trial's main thread. Training therefore
runs in a thread of the trial, a callback puts each row on a queue actor, and the main thread passes
rows on. Ray's own `TuneReportCallback` can block for ever at the end of a run: its queue holds one
row, and nobody takes it once the trial's last report waits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray.train
from ray.util.queue import Empty, Queue

from forge_ray.errors import TrainingError

T = TypeVar("T")

_POLL_S = 1.0


class QueueBridge(ray.train.UserCallback):
    """Train callback that puts rank 0's metrics of each report on a queue."""

    def __init__(self, rows: Queue) -> None:
        self._rows = rows

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Called in the Train controller after all ranks reported."""
        self._rows.put(metrics[0])


@dataclass
class _Outcome(Generic[T]):
    value: T | None = None
    error: BaseException | None = None


def relay(
    train: Callable[[Sequence[ray.train.UserCallback]], T],
    report: Callable[[dict[str, Any]], None],
    *,
    required: Sequence[str],
) -> T:
    """Runs `train` in a thread and reports each of its rows from this one.

    Args:
        train: Runs a Train job to its end with the callbacks it is given.
        report: Takes one row; blocks until Tune answered.
        required: Names that every row must hold as finite numbers (a typo would switch pruning
            off); a metric that is NaN is allowed, its trial fails at the end.

    Returns:
        What `train` returned.

    Raises:
        TrainingError: A row lacks a required name.
    """
    # No CPU: the actor must fit the trial's own placement group, whatever it holds.
    rows = Queue(actor_options={"num_cpus": 0})
    outcome: _Outcome[T] = _Outcome()
    thread = threading.Thread(target=_run, args=(train, QueueBridge(rows), outcome), daemon=True)
    thread.start()
    # All puts happen before `fit` returns, so draining after the thread's end loses nothing.
    while thread.is_alive() or not rows.empty():
        try:
            row = rows.get(timeout=_POLL_S)
        except Empty:
            continue
        check_row(row, required)
        report(row)
    rows.shutdown()
    if outcome.error is not None:
        raise outcome.error
    # The thread ended without an error, so it stored what `train` returned.
    return outcome.value  # type: ignore[return-value]


def check_row(row: dict[str, Any], required: Sequence[str]) -> None:
    """Refuses a row that lacks a name or holds something else than a number there.

    Raises:
        TrainingError: See above.
    """
    for name in required:
        value = row.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number:
            raise TrainingError(
                f"training row must hold the number {name}, got {value!r} among "
                f"{', '.join(sorted(row))}. Set `metric` to a metric that training reports."
            )
    if not math.isfinite(row["global_step"]):
        raise TrainingError(f"global_step must be finite, got {row['global_step']}.")


def _run(
    train: Callable[[Sequence[ray.train.UserCallback]], T],
    bridge: QueueBridge,
    outcome: _Outcome[T],
) -> None:
    try:
        outcome.value = train([bridge])
    except BaseException as error:  # noqa: BLE001 - carried to the main thread, raised there
        outcome.error = error
