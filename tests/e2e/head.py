"""A Ray head of its own with token authentication, as a user would start it, and its end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.clusters import descendants
from tests.gr.processes import pids_of, wait_until

_PR_SET_PDEATHSIG, _STARTS = 1, 3
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class TokenHead:
    """A head on free ports of loopback; `stop` ends it and whatever runs on it.

    Attributes:
        folder: Holds the token; short, for Ray's sockets live below it.
        port: Of the dashboard.
        process: The head.
    """

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, *, num_cpus: int = 2) -> TokenHead:
        """Starts a head and waits until its dashboard answers; three times on a busy machine."""
        for _ in range(_STARTS):
            head = cls._spawn(num_cpus=num_cpus)
            if head.has_started():
                return head
            said = (head.folder / "head.log").read_text()
            head.stop()
        raise AssertionError(said)

    @classmethod
    def _spawn(cls, *, num_cpus: int) -> TokenHead:
        folder = Path(tempfile.mkdtemp(prefix="ray-head-", dir="/tmp"))
        (folder / "token").write_text(secrets.token_hex(32))
        ports = _free_ports(8)
        names = ["port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port"]
        names += ["dashboard-agent-grpc-port", "metrics-export-port", "node-manager-port"]
        names += ["object-manager-port"]
        command = ["ray", "start", "--head", "--block", "--num-cpus", str(num_cpus)]
        command += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
        command += ["--temp-dir", str(folder / "ray"), "--object-store-memory", str(200 * 2**20)]
        # Zero lets the system choose: two heads of one machine share Ray's default range.
        command += ["--min-worker-port", "0", "--max-worker-port", "0"]
        for name, port in zip(names, ports, strict=True):
            command += [f"--{name}", str(port)]
        with (folder / "head.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=_environment(folder, RAY_AUTH_MODE="token"),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        return cls(folder, ports[1], process)

    @property
    def address(self) -> str:
        """URL of the dashboard."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a user's commands: who has the token, and nothing of Ray's beside it."""
        return _environment(self.folder)

    def has_started(self) -> bool:
        """Waits; False where the head gave up, for it waits half a minute for its own raylet."""
        try:
            wait_until(lambda: self.is_ready() or self.process.poll() is not None, "no head", 300)
        except BaseException:
            self.stop()
            raise
        return self.process.poll() is None

    def is_ready(self) -> bool:
        """Whether the head has started and its Jobs API answers."""
        if "Ray runtime started" not in (self.folder / "head.log").read_text():
            return False
        headers = {"Authorization": f"Bearer {(self.folder / 'token').read_text()}"}
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def kill(self) -> None:
        """Ends all its processes at once, drivers of jobs too: a machine that is gone."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ends the head; its raylet ends the workers, and the drivers of jobs with them."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                for pid in pids_of(str(self.folder)):
                    os.kill(pid, signal.SIGKILL)
                self.process.wait()
        wait_until(lambda: not pids_of(str(self.folder)), "processes of the head are left", 60)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def token_head() -> Iterator[TokenHead]:
    """A head for the length of a block."""
    head = TokenHead.start()
    try:
        yield head
    finally:
        head.stop()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
