"""Reaching a cluster: tokens, addresses, logs that break off. A small server stands in for it."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray._private.authentication import authentication_utils
from ray.job_submission import JobDetails, JobStatus, JobType

from forge_ray.errors import ClusterError, ConfigError
from forge_ray.launch import jobs
from forge_ray.launch.jobs import Cluster, follow_job, open_cluster, our_jobs

TOKEN = "t" * 64


class Head(HTTPServer):
    """Answers as a dashboard does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.token: str | None = TOKEN
        self.body = json.dumps({"version": "4", "ray_version": "2.60.0"})
        self.tokens_seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        head = cast(Head, self.server)
        given = self.headers.get("Authorization", "")
        head.tokens_seen.append(given)
        code = 200
        if head.token is not None:
            code = 401 if not given else 200 if given == f"Bearer {head.token}" else 403
        self.send_response(code)
        self.end_headers()
        self.wfile.write(head.body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def head(monkeypatch, tmp_path) -> Iterator[Head]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with Head() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_token_opens_a_cluster_that_asks(head: Head) -> None:
    found = open_cluster(f"{head.url}/")
    assert (found.address, found.ray_version) == (head.url, "2.60.0")
    assert found.asks_for_token
    assert found.warnings == []


def test_a_token_stays_here_where_none_is_asked(head: Head, monkeypatch) -> None:
    # As with RAY_AUTH_MODE=token here, which Ray reads once in a process.
    header = {"Authorization": f"Bearer {TOKEN}"}
    loader = SimpleNamespace(get_token_for_http_header=lambda: header)
    monkeypatch.setattr(authentication_utils, "is_token_auth_enabled", lambda: True)
    monkeypatch.setattr(
        "ray._raylet.AuthenticationTokenLoader", SimpleNamespace(instance=lambda: loader)
    )
    head.token = None
    found = open_cluster(head.url)
    assert set(head.tokens_seen) == {""}
    assert "Start its Ray with RAY_AUTH_MODE=token" in found.warnings[0]


def test_the_address_given_wins_over_rays_variables(head: Head, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert open_cluster(head.url).client.get_address() == head.url
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"


def test_a_token_is_read_from_its_file(head: Head, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert open_cluster(head.url).asks_for_token
    (tmp_path / "other").write_text("x" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    with pytest.raises(ClusterError, match=f"refuses \\(from {tmp_path / 'other'}\\)"):
        open_cluster(head.url)


def test_a_wrong_token_is_told_and_not_shown(head: Head, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "guess")
    with pytest.raises(ClusterError, match=r"must know the token, .*RAY_AUTH_TOKEN") as raised:
        open_cluster(head.url)
    assert "guess" not in str(raised.value)


def test_a_missing_token_is_told(head: Head, monkeypatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(ClusterError, match=r"must be given a token, got none. Set RAY_AUTH_TOKEN"):
        open_cluster(head.url)


@pytest.mark.parametrize("body", ["<html>", "[]", "{}"])
def test_something_else_answers(head: Head, body: str) -> None:
    head.token, head.body = None, body
    with pytest.raises(ClusterError, match="must be the dashboard of a Ray cluster, got HTTP 200"):
        open_cluster(head.url)


def test_nothing_answers(head: Head) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"got no answer from {url}: .*refused"):
            open_cluster(url)


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", "http://", ""])
def test_an_address_is_a_url(address: str) -> None:
    with pytest.raises(ConfigError, match="--address must be the URL"):
        open_cluster(address)


def test_a_password_in_the_address_is_not_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        open_cluster("http://me:hunter2@head:8265")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "num_warnings"),
    [("http://10.0.0.1:8265", 1), ("https://ray.example", 0), ("http://localhost:8265", 0)],
)
def test_plain_http_to_elsewhere_is_warned_of(address: str, num_warnings: int) -> None:
    found = Cluster(address=address, client=cast(Any, None), ray_version="", asks_for_token=True)
    assert len(found.warnings) == num_warnings


class Job:
    """A job whose log connection breaks off: each entry is what one connection brings.

    A number is a silence of that many seconds.
    """

    def __init__(self, connections: list[list[str | float | Exception]]) -> None:
        self.connections = connections
        self.now = 0.0

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for chunk in self.connections.pop(0):
            if isinstance(chunk, Exception):
                raise chunk
            if isinstance(chunk, str):
                yield chunk
            else:
                self.now += chunk

    def get_job_status(self, _: str) -> JobStatus:
        return JobStatus.RUNNING if self.connections else JobStatus.SUCCEEDED

    def list_jobs(self) -> list[Any]:
        return []


def follow(job: Job, monkeypatch) -> str:
    monkeypatch.setattr(jobs, "_PAUSE_S", 0.0)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: job.now))
    monkeypatch.setattr(jobs, "find_job", lambda *_: None)
    text: list[str] = []
    add: Callable[[str], object] = text.append
    follow_job(cast(Cluster, SimpleNamespace(address="http://x", client=job)), "id", add)
    return "".join(text)


def test_a_log_that_breaks_off_goes_on_without_repeating(monkeypatch) -> None:
    lost = ConnectionResetError("lost")
    job = Job([["ab\n", "cd\n", lost], [], ["ab\ncd", "\nef\n"], ["ab\ncd\nef\ngh\n"]])
    assert follow(job, monkeypatch) == "ab\ncd\nef\ngh\n"


def test_a_quiet_log_may_break_off(monkeypatch) -> None:
    lost = ConnectionResetError("lost")
    connections = [["ab\n", 3600.0, lost], [50.0, lost], ["ab\n", 3600.0, lost], ["ab\ncd\n"]]
    assert follow(Job(connections), monkeypatch) == "ab\ncd\n"


def test_a_cluster_that_stays_away_is_told(monkeypatch) -> None:
    lost = ConnectionResetError("lost")
    told = "must answer, got no answer for 70 s, at last: lost"
    with pytest.raises(ClusterError, match=told):
        follow(Job([["ab\n", lost], [30.0, lost], [40.0, lost], []]), monkeypatch)


@pytest.mark.parametrize(
    ("asked", "last", "told"),
    [
        ({"pip": {}}, "ERROR: No matching a==2", "--pip .* can install, got No matching a==2. See"),
        ({"container": {}}, "No such file: 'podman'", "--image .* podman, got No such file"),
        ({}, "no space left", "every node must .* environment, got no space left"),
    ],
)
def test_an_environment_that_a_node_cannot_make_is_told(asked: Any, last: str, told: str) -> None:
    job = JobDetails(
        type=JobType.SUBMISSION,
        submission_id="tiny-1",
        status=JobStatus.FAILED,
        entrypoint="python",
        error_type="RUNTIME_ENV_SETUP_FAILURE",
        message=f"runtime_env setup failed: a traceback\n    {last}\n",
        runtime_env=asked,
        metadata={jobs.KIND: "sweep"},
    )
    client = SimpleNamespace(list_jobs=lambda: [job])
    (found,) = our_jobs(cast(Cluster, SimpleNamespace(address="http://x", client=client)))
    assert re.search(told, found.reason)
