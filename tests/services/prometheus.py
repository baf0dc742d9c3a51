"""A Prometheus of the test's own, from the Debian package, and promtool."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.services.postgresql import free_port


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def ask(self, path: str, **query: str) -> Any:
        """Data of an API call; the reason where Prometheus refuses it."""
        words = urllib.parse.urlencode(query)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{words}", timeout=30) as page:
                return json.load(page)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Samples of an expression now."""
        return list(self.ask("query", query=expression)["result"])

    def value(self, expression: str) -> float:
        """The one sample of an expression; NaN where there is none."""
        found = self.query(expression)
        assert len(found) <= 1
        return float(found[0]["value"][1]) if found else float("nan")


def program(name: str) -> str:
    """Path of prometheus or promtool; the test is skipped where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} not found; install it (apt-get install prometheus)")
    return found


def promtool(*words: str, cwd: Path | None = None) -> str:
    """What promtool prints; it must succeed."""
    command = [program("promtool"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def scraping(config: str, folder: Path) -> Iterator[Prometheus]:
    """A server with this configuration for the block; its files lie in `folder`."""
    folder.mkdir()
    path = folder / "prometheus.yaml"
    path.write_text(config, encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus"),
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(f"http://{address}/-/ready")
        yield Prometheus(f"http://{address}")
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url: str, *, timeout_s: float = 60) -> None:
    """Returns once a page answers."""
    until = time.monotonic() + timeout_s
    while not _answers(url):
        assert time.monotonic() < until, f"{url} does not answer"
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
