"""Rows of a nested Ray Train run, carried into the Tune trial that started it.

Train reports in its controller process, Tune listens in the trial's main thread. Training therefore
runs in a thread of the trial, a callback sends each row over a local socket, and the main thread
passes rows on. Ray starts the controller on the trial's own node, so the loopback address serves;
a queue actor would do the same at the price of one more process for every trial. Ray's own
`TuneReportCallback` can block for ever at the end of a run: its queue holds one row, and nobody
takes it once the trial's last report waits.
"""

from __future__ import annotations

import contextlib
import math
import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from typing import Any, Generic, TypeVar

import ray.train

from forge_ray.errors import TrainingError

T = TypeVar("T")

_LOOPBACK = "127.0.0.1"
_END: dict[str, Any] = {}
"""Known by identity: the training thread has ended."""


class SocketBridge(ray.train.UserCallback):
    """Train callback that sends rank 0's metrics of each report to the trial; picklable."""

    def __init__(self, address: tuple[str, int], secret: bytes) -> None:
        self._address = address
        self._secret = secret

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Called in the Train controller after all ranks reported; the trial has the row then."""
        with Client(self._address, authkey=self._secret) as connection:
            connection.send(metrics[0])
            connection.recv()


@contextlib.contextmanager
def _listening(rows: queue.SimpleQueue[dict[str, Any]]) -> Iterator[SocketBridge]:
    """Puts what bridges send on a queue while the block runs."""
    secret = secrets.token_bytes(32)
    with Listener((_LOOPBACK, 0), authkey=secret) as listener:
        address = (_LOOPBACK, int(listener.address[1]))
        arguments = (listener, rows)
        thread = threading.Thread(target=_receive, args=arguments, name="rows", daemon=True)
        thread.start()
        try:
            yield SocketBridge(address, secret)
        finally:
            # A blocked accept does not notice that its socket was closed.
            with Client(address, authkey=secret) as connection:
                connection.send(None)
            thread.join()


def _receive(listener: Listener, rows: queue.SimpleQueue[dict[str, Any]]) -> None:
    while True:
        # A sender that was killed, or another program that knocked, ends its own call only.
        with (
            contextlib.suppress(AuthenticationError, EOFError, OSError),
            listener.accept() as connection,
        ):
            row = connection.recv()
            if row is None:
                return
            rows.put(row)
            connection.send(None)


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
    rows: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    outcome: _Outcome[T] = _Outcome()
    with _listening(rows) as bridge:
        arguments = (train, bridge, outcome, rows)
        threading.Thread(target=_run, args=arguments, daemon=True).start()
        # Every row was acknowledged before `fit` returned, so none comes after the end.
        while (row := rows.get()) is not _END:
            check_row(row, required)
            report(row)
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
    bridge: SocketBridge,
    outcome: _Outcome[T],
    rows: queue.SimpleQueue[dict[str, Any]],
) -> None:
    try:
        outcome.value = train([bridge])
    except BaseException as error:  # noqa: BLE001 - carried to the main thread, raised there
        outcome.error = error
    finally:
        rows.put(_END)
