"""A cloud's notice becomes a drain of the node it is meant for, in a real cluster of two."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import AuthenticationError, RpcError

from forge_ray.errors import ClusterError, ConfigError
from forge_ray.launch import drain
from forge_ray.launch.drain import ThisNode, aws_notice, gcp_notice, watch


class Metadata(BaseHTTPRequestHandler):
    """The metadata service of a cloud; `answers` maps paths to what it says."""

    answers: dict[str, str]

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        text = self.answers.get(self.path)
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def metadata() -> Iterator[tuple[str, dict[str, str]]]:
    answers = {"/latest/api/token": "secret", "/computeMetadata/v1/instance/preempted": "FALSE"}
    handler = type("Handler", (Metadata,), {"answers": answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", answers
        server.shutdown()


def aws_action(seconds: float) -> str:
    ends = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": ends.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_aws_says_when_the_machine_goes(metadata: tuple[str, dict[str, str]]) -> None:
    url, answers = metadata
    assert aws_notice(url) is None
    answers["/latest/meta-data/spot/instance-action"] = aws_action(120)
    left = aws_notice(url)
    assert left is not None
    assert 100 < left <= 120
    answers["/latest/meta-data/spot/instance-action"] = aws_action(-5)
    assert aws_notice(url) == 0


def test_gcp_says_that_the_machine_goes(metadata: tuple[str, dict[str, str]]) -> None:
    url, answers = metadata
    assert gcp_notice(url) is None
    answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
    assert gcp_notice(url) == drain.GCP_NOTICE_S


class Recorder:
    """A node that goes by itself after some looks."""

    def __init__(self, *, leaves: bool = False) -> None:
        self.drained: list[float] = []
        self._leaves = leaves

    def drain(self, seconds: float) -> None:
        self.drained.append(seconds)

    def has_left(self) -> bool:
        return self._leaves


def test_the_watch_outlasts_a_silent_service_and_drains_once() -> None:
    said: Iterator[float | None] = iter([None, None, 77.0])
    failures = iter([OSError("refused")])

    def notice() -> float | None:
        with contextlib.suppress(StopIteration):
            raise next(failures)
        return next(said)

    node = Recorder()
    assert watch(node, notice, poll_s=0.001)  # type: ignore[arg-type]
    assert node.drained == [77.0]


def test_the_watch_ends_with_ray() -> None:
    node = Recorder(leaves=True)
    assert not watch(node, lambda: None, poll_s=0.001)  # type: ignore[arg-type]
    assert node.drained == []


def test_no_cluster_is_said() -> None:
    with pytest.raises(ConfigError, match="--address must be a Ray cluster that answers"):
        ThisNode("127.0.0.1:1")
    assert drain.main(["--seconds", "5", "--address", "127.0.0.1:1"]) == 2


def test_a_wrong_token_is_said(
    metadata: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str) -> None:
        raise AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(drain, "GcsClient", refuse)
    # Ray writes this machine's address for loopback, where nothing listens.
    resolve = "canonicalize_bootstrap_address_or_die"
    monkeypatch.setattr(drain.services, resolve, lambda address: address)
    address = metadata[0].removeprefix("http://")
    with pytest.raises(ConfigError, match=f"the token must be that of the cluster at {address}"):
        ThisNode(address)


class Gcs:
    """A cluster of one node, whose next answers `says` holds: an error or nothing."""

    def __init__(self) -> None:
        self.says: list[RpcError | None] = []
        self.state = GcsNodeInfo.ALIVE
        self.why = ""
        self.deadlines: list[int] = []

    def _answer(self) -> None:
        error = self.says.pop(0) if self.says else None
        if error is not None:
            raise error

    def get_all_node_info(self, timeout: float | None = None) -> dict[bytes, GcsNodeInfo]:
        self._answer()
        return {b"node": GcsNodeInfo(state=self.state, instance_id="machine")}

    def drain_node(
        self, node: str, reason: int, text: str, deadline_ms: int, *, timeout: float
    ) -> tuple[bool, str]:
        self._answer()
        self.deadlines.append(deadline_ms)
        return not self.why, self.why


@pytest.fixture
def gcs(metadata: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Gcs:
    gcs = Gcs()
    monkeypatch.setattr(drain, "GcsClient", lambda address: gcs)
    monkeypatch.setattr(drain.services, "canonicalize_bootstrap_address_or_die", lambda one: one)
    monkeypatch.setattr(drain.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", "machine")
    monkeypatch.setenv("RAY_ADDRESS", metadata[0].removeprefix("http://"))
    return gcs


def this_node() -> ThisNode:
    return ThisNode(os.environ["RAY_ADDRESS"])


SILENCE = RpcError("deadline exceeded")


def test_a_cluster_that_is_silent_for_a_while_is_not_gone(
    gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = this_node()
    gcs.says = [SILENCE, SILENCE]
    assert [node.has_left() for _ in range(3)] == [False] * 3
    monkeypatch.setattr(drain, "SILENCE_S", 0.0)
    gcs.says = [SILENCE]
    assert node.has_left()
    gcs.state = GcsNodeInfo.DEAD
    assert node.has_left()


def test_the_watch_outlasts_a_silent_cluster_and_tells_it_of_the_notice(gcs: Gcs) -> None:
    node = this_node()
    said: list[float | None] = [*[None] * 40, 60.0]
    gcs.says = [SILENCE] * 4  # two looks at the node, two drains
    started = time.time()
    assert watch(node, lambda: said.pop(0))
    assert not gcs.says
    (deadline_ms,) = gcs.deadlines
    # What was lost in asking again is not added to the time that is left.
    assert started - 0.001 <= deadline_ms / 1000 - 60 <= time.time()


def test_a_drain_that_nobody_hears_or_that_is_refused_is_said(gcs: Gcs) -> None:
    node = this_node()
    gcs.says = [SILENCE]
    with pytest.raises(ClusterError, match="must answer until this node goes, got: deadline"):
        node.drain(0)
    gcs.why = "no such node"
    with pytest.raises(ClusterError, match="must accept the drain, got: no such node"):
        node.drain(10)
    assert drain.main(["--seconds", "1", "--address", os.environ["RAY_ADDRESS"]]) == 2


@pytest.mark.slow
@pytest.mark.ray
def test_a_drained_node_leaves_and_the_other_stays() -> None:
    token = secrets.token_hex(32)
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.drain_run"],
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    codes = {name: code for name, (code, _) in seen.items()}
    assert codes == {"wrong token": 2, "stranger": 2, "drained": 0, "gone": 2}
    assert "the token must be that of the cluster" in seen["wrong token"][1]
    assert "must be a node of the cluster, got none named machine-c" in seen["stranger"][1]
    # Idle, the node left long before its time was over; the head still answers.
    assert "drains: 100 seconds to save and move" in seen["drained"][1]
    assert "must be a node of the cluster, got none named machine-b" in seen["gone"][1]
    assert token not in done.stdout + done.stderr
