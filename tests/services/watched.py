"""A real sweep on a real Ray with dashboard and token, scraped by a real Prometheus as it runs."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forge_ray.config import load_config
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import Ledger, SweepRecords
from tests.launch.monitoring import RULES, SERVER
from tests.services.prometheus import Prometheus, scraping
from tests.tiny_sweep import with_sections

SWEEP = with_sections(
    """
name: watched
budget: {max_hours: 1, prices: {cpu_hour: 0.05}}
"""
)
DRIVER = """
import sys
from pathlib import Path
import ray
from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.launch.connect import connected
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.sweep import run_sweep

file, store = sys.argv[1:]
with connected(address="local", num_cpus=2):
    context = ray.init(ignore_reinit_error=True, log_to_driver=False)
    print("dashboard", context.dashboard_url, flush=True)
    sys.stdin.readline()
    run_sweep(load_config(SweepConfig, path=Path(file)), ArtifactStore(store))
    print("done", flush=True)
    sys.stdin.readline()
"""
"""Begins when it is sent a line; ends with the next, or with the end of its input."""

OPEN = """
import sys
import ray
from forge_ray.launch.connect import connected

with connected(address="local", num_cpus=1):
    context = ray.init(ignore_reinit_error=True, log_to_driver=False)
    print("dashboard", context.dashboard_url, flush=True)
    sys.stdin.readline()
"""
_LAST_FIGURES_S = 45


@dataclass(frozen=True)
class WatchedSweep:
    """A sweep that has run; its Ray and Prometheus are up.

    Attributes:
        config: The sweep file.
        folder: The sweep's folder.
        dashboard: Address of Ray's dashboard.
        token: What the dashboard asks for.
        prometheus: Scraped every second while the sweep ran.
        began: `time.time()` when the sweep began.
        ended: The same when it ended.
    """

    config: SweepConfig
    folder: Path
    dashboard: str
    token: str
    prometheus: Prometheus
    began: float
    ended: float

    @property
    def records(self) -> SweepRecords:
        """The sweep's ledger."""
        return Ledger(self.folder).read()


@contextmanager
def watched_sweep() -> Iterator[WatchedSweep]:
    """Runs the sweep before the block begins."""
    home = Path(tempfile.mkdtemp(prefix="watched-"))
    file, store, token = home / "sweep.yaml", home / "store", secrets.token_hex(32)
    file.write_text(SWEEP, encoding="utf-8")
    (home / "token").write_text(token, encoding="utf-8")
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "token")}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", DRIVER, str(file), str(store)]
    with (home / "log").open("w") as log:
        driver = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    try:
        dashboard = f"http://{_said(driver, 'dashboard', home)}"
        with scraping(server_config(dashboard, home / "token"), home / "prometheus") as prometheus:
            began = time.time()
            _say(driver)
            _said(driver, "done", home)
            folder = store / "sweeps" / "watched"
            ended = time.time()
            _wait_for_last_figures(prometheus, Ledger(folder).read())
            yield WatchedSweep(
                config=load_config(SweepConfig, path=file),
                folder=folder,
                dashboard=dashboard,
                token=token,
                prometheus=prometheus,
                began=began,
                ended=ended,
            )
    finally:
        try:
            _end(driver)
        finally:
            shutil.rmtree(home)


@contextmanager
def open_ray(folder: Path) -> Iterator[str]:
    """Address of the dashboard of a Ray that asks for no token."""
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    env.pop("RAY_ADDRESS", None)
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", OPEN],
            env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    try:
        yield f"http://{_said(driver, 'dashboard', folder)}"
    finally:
        _end(driver)


def _end(driver: subprocess.Popen[str]) -> None:
    # Not Ctrl-C, which is ignored below a shell that runs the tests in the background.
    assert driver.stdin is not None
    driver.stdin.close()
    try:
        driver.wait(400)  # a busy machine ends a Ray slowly
    except subprocess.TimeoutExpired:
        driver.kill()
        raise


def server_config(dashboard: str, token: Path) -> str:
    """The configuration that we ship, for this Ray, ten times as often."""
    text = SERVER.read_text(encoding="utf-8")
    for old, new in (
        ("http://127.0.0.1:8265", dashboard),
        ("/etc/prometheus/ray-token", str(token)),
        (f"[{RULES.name}]", json.dumps([str(RULES)])),
        ("10s", "5s"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    return text


def _wait_for_last_figures(prometheus: Prometheus, records: SweepRecords) -> None:
    # What a gauge was last set to reaches the node's page within ten seconds, and the server with
    # its next look at that page. Whether it did is for the tests to say.
    until = time.monotonic() + _LAST_FIGURES_S
    for state, count in Counter(one.state for one in records.trials.values()).items():
        shown = f"sum(ray_forge_trials{{state={json.dumps(state)}}})"
        while prometheus.value(shown) != count and time.monotonic() < until:
            time.sleep(1)


def _say(driver: subprocess.Popen[str]) -> None:
    assert driver.stdin is not None
    driver.stdin.write("\n")
    driver.stdin.flush()


def _said(driver: subprocess.Popen[str], word: str, home: Path) -> str:
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise AssertionError((home / "log").read_text())
