"""A PostgreSQL cluster of the test's own, from the Debian package, as an unprivileged user."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

USER, PASSWORD = "forge", "a secret:word"


@dataclass(frozen=True)
class Cluster:
    """A running server.

    Attributes:
        folder: Its data.
        port: TCP port on the loopback address.
    """

    folder: Path
    port: int

    def run(self, program: str, *arguments: str) -> None:
        """Runs one of the package's programs, as `postgres` where we are root."""
        command = [str(find_programs() / program), *arguments]
        if os.getuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd="/")

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        options = f"-p {self.port} -k {self.folder.parent} -c listen_addresses=127.0.0.1"
        log = str(self.folder.parent / "log")
        self.run("pg_ctl", "start", "-w", "-D", str(self.folder), "-l", log, "-o", options)

    def stop(self) -> None:
        """Stops it at once; connections break."""
        self.run("pg_ctl", "stop", "-w", "-m", "fast", "-D", str(self.folder))

    def create(self, database: str) -> None:
        """Makes an empty database."""
        host = str(self.folder.parent)
        self.run("createdb", "-h", host, "-p", str(self.port), "-U", USER, database)


def find_programs() -> Path:
    """Where the package keeps initdb; the test is skipped where it is missing."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("postgresql not found; install it (apt-get install postgresql)")
    return found[-1].parent


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster for the block; its files go with it."""
    find_programs()
    home = Path(tempfile.mkdtemp(prefix="forge-pg-"))
    if os.getuid() == 0:
        shutil.chown(home, "postgres")
    cluster = Cluster(home / "data", free_port())
    secret = home / "password"
    secret.write_text(PASSWORD)
    if os.getuid() == 0:
        shutil.chown(secret, "postgres")
    # Local sockets are trusted for createdb; a TCP client has to know the password.
    access = ("--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}")
    try:
        cluster.run("initdb", "-D", str(cluster.folder), "-U", USER, "-N", *access)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(home)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
