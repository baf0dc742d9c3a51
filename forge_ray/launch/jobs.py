"""A cluster's Jobs API: reaching it with the right token, its jobs, their logs.

What a job runs is none of its business; see `forge_ray.launch.submit`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from forge_ray.errors import ClusterError, ConfigError
from forge_ray.launch.connect import default_token_file

KIND = "forge-ray"
"""Key of a job's metadata that marks it as ours."""
_TIMEOUT_S = 10.0
_PATIENCE_S = 60.0
_PAUSE_S = 1.0
_EXPLAINED = (JobStatus.PENDING, JobStatus.FAILED)
_NO_ENVIRONMENT = "RUNTIME_ENV_SETUP_FAILURE"
_ENVIRONMENTS = {
    "container": (
        "--image must run on every node, with podman",
        "Install podman there, or start the cluster's nodes from the image and leave --image out.",
    ),
    "pip": (
        "--pip must name packages that every node can install",
        "See that they exist for its Python, and that pip reaches their index from there.",
    ),
    "": (
        "every node must be able to make the job's environment",
        "See runtime_env_agent.log on the node.",
    ),
}
"""What a job's environment asks of a cluster and what to do, by the field of Ray's that asks."""
_UNAUTHORIZED, _FORBIDDEN = 401, 403
_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
_UNREACHED = (
    "Check that the head runs and the port is forwarded; a job that runs goes on without us."
)
_NO_TOKEN = (
    "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with the cluster's token "
    "(on its head: `ray get-auth-token`)."
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that answered.

    Attributes:
        address: URL of its dashboard, which serves the Jobs API.
        client: Ray's own client, with the token.
        ray_version: What runs there.
        asks_for_token: Whether it turns away who has none.
    """

    address: str
    client: JobSubmissionClient
    ray_version: str
    asks_for_token: bool

    @property
    def warnings(self) -> list[str]:
        """What is not safe about it, one line each."""
        found = []
        if not self.asks_for_token:
            found.append(
                f"{self.address} must ask for a token, got answers without one: whoever reaches it "
                "can run code there. Start its Ray with RAY_AUTH_MODE=token (docs/clusters.md)."
            )
        if self.address.startswith("http://") and not _is_loopback(self.address):
            found.append(
                f"{self.address} must be https or a tunnel's end on this machine, got plain http: "
                "the token travels readable. Forward the port (`kubectl port-forward`, `ray "
                "dashboard`, `ssh -L`)."
            )
        return found


def open_cluster(address: str) -> Cluster:
    """Reaches a cluster; its token goes only to one that asks for a token.

    Raises:
        ConfigError: The address is no URL.
        ClusterError: Nothing answers there, it is no Ray, or it refuses the token.
    """
    address = _checked(address)
    token = _token()
    answer = _ask(address, token=None)
    asks = answer.status == _UNAUTHORIZED
    if asks and token is None:
        raise ClusterError(f"{address} must be given a token, got none. {_NO_TOKEN}")
    if asks:
        answer = _ask(address, token=token)
    if answer.status in (_UNAUTHORIZED, _FORBIDDEN):
        raise ClusterError(
            f"{address} must know the token, got one that it refuses (from {_token_source()}). "
            f"{_NO_TOKEN}"
        )
    if not answer.ray_version:
        raise ClusterError(
            f"{address} must be the dashboard of a Ray cluster, got HTTP {answer.status} from "
            "something else. Pass the address that `ray status` and `ray dashboard` show, "
            "http://host:8265."
        )
    # An empty one keeps Ray from adding the token where RAY_AUTH_MODE is set here and not there.
    headers = {"Authorization": f"Bearer {token}" if asks else ""}
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray lets its variables win over the address that it is given.
    with _without("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"), answering(address):
        client = JobSubmissionClient(address, headers=headers)
    return Cluster(
        address=address, client=client, ray_version=answer.ray_version, asks_for_token=asks
    )


@contextmanager
def answering(address: str) -> Iterator[None]:
    """Turns what Ray's client raises into an error that says what to do.

    Raises:
        ClusterError: The cluster went away, turned us away, or refused the request.
    """
    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(f"{address} must know the token, got a refusal. {_NO_TOKEN}") from error
    except (OSError, aiohttp.ClientError) as error:  # all of requests' are OSError
        raise ClusterError(f"{address} must answer, got: {_line(error)}. {_UNREACHED}") from error
    except RuntimeError as error:
        raise ClusterError(
            f"{address} must accept the request, got: {_line(error)}. See the dashboard's log on "
            "the head."
        ) from error


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A submitted sweep as its cluster knows it.

    Attributes:
        job_id: Ray's submission id.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        reason: Why it waits, or the last line of a failed job.
        started_s: When it was accepted, in seconds of Unix time.
        ended_s: When it ended; None before.
        command: What it runs.
        node: Ray's id of the driver's node; empty while it waits for one.
        exit_code: Of the driver; None where it has none.
        said: What the submission noted: sweep, config, store, file, tree.
    """

    job_id: str
    status: str
    reason: str = ""
    started_s: float | None = None
    ended_s: float | None = None
    command: str = ""
    node: str = ""
    exit_code: int | None = None
    said: Mapping[str, str]

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return JobStatus(self.status).is_terminal()

    @property
    def has_succeeded(self) -> bool:
        """Whether it has ended well."""
        return self.status == JobStatus.SUCCEEDED.value


def our_jobs(cluster: Cluster) -> list[JobRecord]:
    """The jobs that forge-ray submitted, oldest first."""
    with answering(cluster.address):
        jobs = cluster.client.list_jobs()
    ours = [one for one in jobs if one.type == JobType.SUBMISSION and KIND in (one.metadata or {})]
    return [_record(one) for one in sorted(ours, key=lambda one: one.start_time or 0)]


def _record(job: JobDetails) -> JobRecord:
    return JobRecord(
        job_id=str(job.submission_id),
        status=job.status.value,
        reason=_reason(job),
        started_s=job.start_time / 1000 if job.start_time else None,
        ended_s=job.end_time / 1000 if job.end_time else None,
        command=job.entrypoint,
        node=job.driver_node_id or "",
        exit_code=job.driver_exit_code,
        said=job.metadata or {},
    )


def _reason(job: JobDetails) -> str:
    """Why a job waits or has failed, in a line."""
    lines = [one.strip() for one in (job.message or "").splitlines() if one.strip()]
    if not lines or job.status not in _EXPLAINED:
        return ""
    if job.error_type != _NO_ENVIRONMENT:
        return lines[-1]
    given = next((name for name in _ENVIRONMENTS if name in (job.runtime_env or {})), "")
    must, todo = _ENVIRONMENTS[given]
    return f"{must}, got {lines[-1].removeprefix('ERROR: ').rstrip('.')}. {todo}"


def find_job(cluster: Cluster, name: str) -> JobRecord:
    """The job of a submission id, or the newest one of a sweep's name.

    Raises:
        ClusterError: There is none.
    """
    jobs = our_jobs(cluster)
    named = [one for one in jobs if name in (one.job_id, one.said.get("sweep"))]
    if not named:
        known = ", ".join(one.job_id for one in jobs) or "none"
        raise ClusterError(
            f"{name} must be a submission or the name of a submitted sweep, got none of: {known}. "
            "See `forge-ray cluster list`."
        )
    return named[-1]


def read_log(cluster: Cluster, job_id: str) -> str:
    """What a job has written so far."""
    with answering(cluster.address):
        return str(cluster.client.get_job_logs(job_id))


def stop_job(cluster: Cluster, job_id: str) -> JobRecord:
    """Asks a job to end and waits until it has."""
    with answering(cluster.address):
        cluster.client.stop_job(job_id)
        while not cluster.client.get_job_status(job_id).is_terminal():
            time.sleep(_PAUSE_S)
    return find_job(cluster, job_id)


def follow_job(cluster: Cluster, job_id: str, write: Callable[[str], object]) -> JobRecord:
    """Writes a job's log from its beginning until the job ends.

    Raises:
        ClusterError: The cluster did not answer for a minute. The job goes on.
    """
    with answering(cluster.address):
        asyncio.run(_follow(cluster, job_id, write))
    return find_job(cluster, job_id)


async def _follow(cluster: Cluster, job_id: str, write: Callable[[str], object]) -> None:
    client, seen = cluster.client, 0
    failing_since: float | None = None
    while True:
        try:
            # A connection can end before the job does; each begins at the log's first line.
            async for chunk in _after(client.tail_job_logs(job_id), seen):
                seen, failing_since = seen + len(chunk), None
                write(chunk)
            if client.get_job_status(job_id).is_terminal():
                return
            failing_since = None
        except (OSError, aiohttp.ClientError, RuntimeError) as error:
            # Not since the last line: a log may be quiet for an hour.
            now = time.monotonic()
            failing_since = now if failing_since is None else failing_since
            if now - failing_since >= _PATIENCE_S:
                raise ClusterError(
                    f"{cluster.address} must answer, got no answer for "
                    f"{now - failing_since:.0f} s, at last: {_line(error)}. {_UNREACHED}"
                ) from error
        await asyncio.sleep(_PAUSE_S)


async def _after(chunks: AsyncIterator[str], skipped: int) -> AsyncIterator[str]:
    """The text of chunks without its first characters; what is skipped is heard as empty text."""
    async for chunk in chunks:
        yield chunk[skipped:]
        skipped = max(0, skipped - len(chunk))


@dataclass(frozen=True, kw_only=True)
class _Answer:
    status: int
    ray_version: str


def _ask(address: str, *, token: str | None) -> _Answer:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{address}/api/version", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            return _Answer(status=response.status, ray_version=_version(response.read()))
    except urllib.error.HTTPError as error:
        return _Answer(status=error.code, ray_version="")
    except (OSError, HTTPException) as error:
        raise ClusterError(
            f"--address must be the dashboard of a running cluster, got no answer from {address}: "
            f"{_line(error)}. Check that the head runs and the port is forwarded "
            "(`kubectl port-forward`, `ray dashboard`, `ssh -L`)."
        ) from error


def _version(body: bytes) -> str:
    try:
        content: Any = json.loads(body)
    except ValueError:
        return ""
    return str(content.get("ray_version", "")) if isinstance(content, dict) else ""


def _checked(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.password:
        raise ConfigError(
            "--address must be the URL of a cluster's dashboard without a password, got "
            f"{parts.scheme or address!r}. Write http://host:8265."
        )
    return address.rstrip("/")


def _token() -> str | None:
    """The token as Ray looks for it: the variable, the file it names, the file in the home."""
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    path = _token_path()
    return (path.read_text(encoding="utf-8").strip() or None) if path.is_file() else None


def _token_path() -> Path:
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given) if given else default_token_file()


def _token_source() -> str:
    return "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN", "").strip() else str(_token_path())


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _line(error: BaseException) -> str:
    reason = getattr(error, "reason", error)
    lines = [one.strip() for one in str(reason).splitlines()]
    first = next((one for one in lines if one.isprintable() and one), type(error).__name__)
    return first.rstrip(".")
