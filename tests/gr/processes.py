"""Processes of this machine, and waiting for what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_until(found: Callable[[], T], otherwise: str, timeout_s: float = 1200) -> T:
    """The first answer that is true; fails with a message when none comes."""
    deadline = time.monotonic() + timeout_s
    while not (answer := found()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
    return answer


def parent_of(pid: int) -> int:
    """The process that started another, 0 where either is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def pids_of(text: str) -> list[int]:
    """Processes whose command holds a text."""
    return [pid for pid in _pids() if text in _command(pid)]


def worker_pids() -> list[int]:
    """Ray Train workers below this process; other runs on the machine are not ours to touch."""
    return [pid for pid in _pids() if "RayTrainWorker" in _command(pid) and _is_ours(pid)]


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""  # the process has ended meanwhile


def _is_ours(pid: int) -> bool:
    while pid and pid != os.getpid():
        pid = parent_of(pid)
    return pid != 0
