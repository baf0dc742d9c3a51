"""A lease on any pyarrow filesystem: one builder a key, replaced when it dies.

Each contender writes a ticket; the oldest live ticket holds the lease. Age is the modification
time that the filesystem gave the ticket, so no two clocks are compared. The holder renews a
heartbeat file; a waiter that sees no renewal for `STALE_AFTER_S` of its own clock, or whose own
machine no longer runs the holder's process, deletes the ticket. Object stores offer no exclusive
create through pyarrow; this needs none. In the worst case (a holder paused for longer than the
limit) two builders make the same content, and publishing keeps one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType

from pyarrow import fs as pafs

from forge_ray.errors import ArtifactError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
STALE_AFTER_S = 30.0
POLL_S = 0.5
# Modification times are coarse (a kernel tick locally, a second on object stores): a contender
# waits this long after writing its ticket, so that equal times are seen by both sides.
SETTLE_LOCAL_S = 0.05
SETTLE_REMOTE_S = 1.2
_LISTING_TRIES = 20


def list_entries(
    filesystem: pafs.FileSystem, path: str, *, recursive: bool = False
) -> list[pafs.FileInfo]:
    """What a folder holds; nothing when it is absent, whatever others do to it meanwhile.

    pyarrow looks whether an absent folder exists only after listing it failed: one that another
    process creates in between is an error there. It is listed again.
    """
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    for _ in range(_LISTING_TRIES - 1):
        with contextlib.suppress(FileNotFoundError):
            return list(filesystem.get_file_info(selector))
    return list(filesystem.get_file_info(selector))


class Lease:
    """One contender for the lease of a directory; use as a context manager.

    State: entering writes the ticket and starts the heartbeat (contending); `wait_until_held`
    returns once this ticket is the oldest live one (held) or the work is done elsewhere; leaving
    deletes ticket and heartbeat.
    """

    def __init__(self, filesystem: pafs.FileSystem, directory: str) -> None:
        self._filesystem = filesystem
        self._directory = directory
        self._name = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._seen: dict[str, tuple[int, float]] = {}
        is_local = isinstance(filesystem, pafs.LocalFileSystem)
        self._settle_s = SETTLE_LOCAL_S if is_local else SETTLE_REMOTE_S

    def __enter__(self) -> Lease:
        self._filesystem.create_dir(self._directory, recursive=True)
        self._write("beat", {"beat": 0})
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        self._write("ticket", owner)
        self._thread.start()
        time.sleep(self._settle_s)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._drop(self._name)

    def wait_until_held(self, is_done: Callable[[], bool]) -> None:
        """Blocks until this contender holds the lease or `is_done()` is true.

        Raises:
            ArtifactError: The lease directory was deleted under us.
        """
        waiting_on = None
        while True:
            tickets = self._tickets()
            if self._name not in tickets:
                raise ArtifactError(
                    f"{self._directory}/{self._name}.ticket must stay while its owner runs, got "
                    "none. Run the command again; do not delete .leases while something runs."
                )
            holder = tickets[0]
            if holder == self._name or is_done():
                return
            if holder != waiting_on:
                logger.info("waiting for another builder of %s", self._directory)
                waiting_on = holder
            if self._is_dead(holder):
                logger.warning("taking over a stale lease in %s", self._directory)
                self._drop(holder)
                continue
            time.sleep(POLL_S)

    def _tickets(self) -> list[str]:
        entries = list_entries(self._filesystem, self._directory)
        tickets = [one for one in entries if one.base_name.endswith(".ticket")]
        tickets.sort(key=lambda one: (one.mtime_ns or 0, one.base_name))
        return [one.base_name.removesuffix(".ticket") for one in tickets]

    def _is_dead(self, name: str) -> bool:
        if self._owner_is_gone(name):
            return True
        beat = self._filesystem.get_file_info(self._path(name, "beat")).mtime_ns or 0
        last, since = self._seen.get(name, (-1, 0.0))
        if beat != last:
            self._seen[name] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > STALE_AFTER_S

    def _owner_is_gone(self, name: str) -> bool:
        try:
            with self._filesystem.open_input_stream(self._path(name, "ticket")) as stream:
                owner = json.loads(stream.read() or b"{}")
        except (FileNotFoundError, OSError):
            return False  # it left by itself; the next listing shows that
        if owner.get("host") != socket.gethostname():
            return False
        try:
            os.kill(int(owner["pid"]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False  # alive, another user's
        return False

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(HEARTBEAT_S):
            count += 1
            try:
                self._write("beat", {"beat": count})
            except OSError as error:
                # A short outage of the storage must not end the build; the next beat may work.
                logger.warning("heartbeat of %s failed: %s", self._directory, error)

    def _path(self, name: str, suffix: str) -> str:
        return f"{self._directory}/{name}.{suffix}"

    def _write(self, suffix: str, content: dict[str, object]) -> None:
        with self._filesystem.open_output_stream(self._path(self._name, suffix)) as stream:
            stream.write(json.dumps(content).encode())

    def _drop(self, name: str) -> None:
        for suffix in ("ticket", "beat"):
            path = self._path(name, suffix)
            try:
                self._filesystem.delete_file(path)
            except FileNotFoundError:
                continue  # two waiters take a dead holder's ticket away at the same time
