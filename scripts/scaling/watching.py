"""What a command and every process below it hold, seen from outside while it runs.

Memory is resident memory (`rss`); `own` is that less what is shared with others, which for workers
of Ray is the object store's pages. The store itself is measured by the blocks that its file has,
which never shrink, so that they are its peak; spilled objects are files of Ray's session.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

LOOK_EVERY_S = 0.5
_DAEMONS = ("raylet", "gcs_server", "dashboard", "log_monitor", "runtime_env", "monitor.py")


@dataclass
class Peaks:
    """Largest values seen during one stage, in bytes, and the time that it was watched for.

    `cpu_seconds` is that of all processes together, which other work on the machine hardly changes.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    driver_rss: int = 0
    driver_own: int = 0
    largest_worker_rss: int = 0
    largest_worker_own: int = 0
    all_workers_own: int = 0
    daemons_own: int = 0
    object_store: int = 0
    spilled: int = 0
    workers: int = 0

    def take(self, seen: dict[str, int]) -> None:
        """Keeps the larger of each value."""
        for name, value in seen.items():
            setattr(self, name, max(getattr(self, name), value))

    def figures(self) -> dict[str, Any]:
        """Rounded, in MiB where bytes were counted."""
        plain = asdict(self)
        counts = {name: round(plain.pop(name), 1) for name in ("seconds", "cpu_seconds")}
        counts["workers"] = plain.pop("workers")
        return {**counts, **{f"{name}_mib": round(value / 2**20) for name, value in plain.items()}}


@dataclass(frozen=True)
class Stage:
    """A part of a command, told by what the store shows from outside."""

    name: str
    rows: int
    """What it works on: items, interactions or users, by its name in the plan."""
    unit: str
    is_done: Callable[[], bool]
    is_at_work: Callable[[], bool]
    """When a killer may strike."""


@dataclass
class Watch:
    """Runs commands and keeps what was seen of each stage."""

    peaks: dict[str, Peaks] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)
    _cpu: float = field(default=0.0, init=False, repr=False)

    @classmethod
    def of(cls, file: Path) -> Watch:
        """What an interrupted run saw, if there was one."""
        if not file.exists():
            return cls()
        kept = json.loads(file.read_text())
        return cls({name: Peaks(**seen) for name, seen in kept["peaks"].items()}, kept["killed"])

    def save(self, file: Path) -> None:
        """Keeps what was seen so far."""
        kept = {"peaks": {name: asdict(one) for name, one in self.peaks.items()}}
        file.write_text(json.dumps({**kept, "killed": self.killed}))

    def run(
        self,
        command: list[str],
        stages: list[Stage],
        log: Path,
        *,
        targets: Sequence[str] = (),
        out: Path | None = None,
    ) -> bool:
        """Runs a command once, killing it in the first target not yet killed; False when killed.

        Args:
            command: words.
            stages: its stages in order.
            log: standard error is appended to it, and standard output where `out` is none.
            targets: names of stages to kill it in.
            out: where standard output goes.
        """
        with log.open("ab") as sink, (out or log).open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=sink)
            looked, self._cpu = time.monotonic(), 0.0
            try:
                while process.poll() is None:
                    stage = next((one for one in stages if not one.is_done()), stages[-1])
                    looked = self._look(stage, process.pid, looked)
                    is_target = stage.name in targets and stage.name not in self.killed
                    if is_target and stage.is_at_work():
                        self.killed.append(stage.name)
                        kill_tree(process)
                        return False
                    time.sleep(LOOK_EVERY_S)
            finally:
                if process.poll() is None:
                    kill_tree(process)
        if process.returncode:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise SystemExit(f"{command} must succeed, got exit code {process.returncode}:\n{tail}")
        return True

    def _look(self, stage: Stage, pid: int, looked: float) -> float:
        peaks = self.peaks.setdefault(stage.name, Peaks())
        now = time.monotonic()
        peaks.seconds += now - looked
        processes = family(pid)
        peaks.take(look(pid, processes))
        total = cpu_seconds(processes)
        # Less than before where a Ray has ended: its processes are in nobody's count any more.
        peaks.cpu_seconds += max(0.0, total - self._cpu)
        self._cpu = total
        return now


def look(pid: int, processes: Sequence[psutil.Process]) -> dict[str, int]:
    """What the processes of a command hold at this moment, by role."""
    names = [one for one in Peaks.__dataclass_fields__ if not one.endswith("seconds")]
    seen = dict.fromkeys(names, 0)
    for one in processes:
        with contextlib.suppress(psutil.Error):  # it ended between listing and looking
            _add(seen, one, is_driver=one.pid == pid)
    return seen


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """CPU time that processes and those of their children that have ended took so far."""
    total = 0.0
    for one in processes:
        with contextlib.suppress(psutil.Error):
            total += sum(one.cpu_times()[:4])
    return total


def _add(seen: dict[str, int], process: psutil.Process, *, is_driver: bool) -> None:
    memory, words = process.memory_info(), " ".join(process.cmdline()[:3])
    own = memory.rss - memory.shared
    if is_driver:
        seen["driver_rss"], seen["driver_own"] = memory.rss, own
    elif any(name in words for name in _DAEMONS):
        seen["daemons_own"] += own
        if "raylet/raylet" in words:
            # The larger one: for a moment, a worker that is being started is a second raylet.
            seen["object_store"] = max(seen["object_store"], store_bytes(process.pid))
            seen["spilled"] = max(seen["spilled"], spilled_bytes(process))
    else:
        seen["workers"] += 1
        seen["all_workers_own"] += own
        seen["largest_worker_rss"] = max(seen["largest_worker_rss"], memory.rss)
        seen["largest_worker_own"] = max(seen["largest_worker_own"], own)


def store_bytes(raylet: int) -> int:
    """Blocks of the shared memory file that a raylet keeps the object store in."""
    total, seen = 0, set()
    for handle in Path(f"/proc/{raylet}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "plasma" not in os.readlink(handle):
                continue
            found = os.stat(handle)
            if found.st_ino not in seen:
                seen.add(found.st_ino)
                total += found.st_blocks * 512
    return total


def spilled_bytes(raylet: psutil.Process) -> int:
    """Objects that Ray's session holds on disk for want of memory."""
    words = [word for word in raylet.cmdline() if word.startswith("--session_dir=")]
    total = 0
    for word in words:
        for path in Path(word.partition("=")[2]).glob("ray_spilled_objects*/*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the command and everything it started."""
    for one in family(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait()


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants; empty when it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
