"""Ends a command whose own Ray has died, instead of letting it wait for answers that never come.

Without its control service (GCS) or its raylet, Ray's calls of the driver block or retry for
minutes, in code that no exception reaches. A thread looks at the processes that this driver
started; a Ray that was joined by address is its cluster's to watch.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray._private import ray_constants
from ray._private import worker as ray_worker

logger = logging.getLogger(__name__)

EXIT_CODE = 2
_POLL_S = 2.0
_VITAL = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)


@contextmanager
def watching(end: Callable[[str], None] | None = None) -> Iterator[None]:
    """Looks after the Ray that this process started while the block runs.

    Args:
        end: Told the name of the process that died, once; by default says so and ends this process.
    """
    stop = threading.Event()
    arguments = (stop, end or _end)
    thread = threading.Thread(target=_watch, args=arguments, name="ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(stop: threading.Event, end: Callable[[str], None]) -> None:
    while not stop.wait(_POLL_S):
        dead = dead_process()
        if dead and not stop.is_set():
            end(dead)
            return


def dead_process() -> str:
    """Name of a vital process of this driver's Ray that has died; empty where all live."""
    # Private names: a test pins them.
    node = ray_worker._global_node
    dead = [kind for kind, _ in node.dead_processes()] if node is not None else []
    return next((kind for kind in _VITAL if kind in dead), "")


def _end(dead: str) -> None:
    logger.error(
        "error: Ray must live as long as this command, got its %s gone (killed, or out of memory). "
        "What was finished is saved; the same command continues.",
        dead,
    )
    node = ray_worker._global_node
    if node is not None:
        # Its workers end with the raylet; nothing of this Ray is left to be asked politely.
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    sys.stdout.flush()
    sys.stderr.flush()
    # The main thread is inside Ray and hears no exception; locks are the kernel's to free.
    os._exit(EXIT_CODE)
