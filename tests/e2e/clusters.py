"""A Ray cluster of several nodes on this machine, each `ray start` a process tree of its own.

Nothing here stops Ray by name: other Rays of the machine are left alone. Every process of a cluster
carries a mark in its environment, by which the last of them is found, also when the test was
killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from tests.gr.processes import parent_of, wait_until

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
MARK = "FORGE_RAY_TEST_CLUSTER"
OBJECT_STORE = 100 * 1024**2
_FAKE_HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class LocalNode:
    """A node that runs."""

    process: subprocess.Popen[str]
    node_id: str

    def kill(self) -> None:
        """Ends all its processes at once, as a machine that is gone."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class LocalCluster:
    """See the module docstring; use `local_cluster`."""

    folder: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    nodes: list[LocalNode] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where drivers join."""
        return f"127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of nodes and drivers."""
        return {
            **os.environ,
            MARK: self.mark,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "disabled",
            # On a busy machine agents take long to come up.
            "RAY_agent_register_timeout_ms": "600000",
            "RAY_ADDRESS": self.address,
        }

    def start_head(self, *words: str, env: Mapping[str, str] | None = None) -> LocalNode:
        """The first node, with the control service; `words` go to `ray start`."""
        return self._start(
            "--head",
            f"--port={self.port}",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-port={self.dashboard_port}",
            f"--temp-dir={self.folder}",
            *words,
            env={name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
            | dict(env or {}),
        )

    def add_node(self, *words: str, env: Mapping[str, str] | None = None) -> LocalNode:
        """One more node."""
        return self._start(f"--address={self.address}", *words, env={**self.env, **(env or {})})

    def drain(self, node: LocalNode, seconds: int) -> None:
        """What a cloud's notice becomes: `ray drain-node`."""
        command = [
            RAY, "drain-node",
            "--address", self.address,
            "--node-id", node.node_id,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message", "the spot market wants it back",
            "--deadline-remaining-seconds", str(seconds),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, env=self.env)

    def alive(self) -> dict[str, GcsNodeInfo]:
        """Nodes that the control service counts as alive, by id."""
        seen = self.ever_seen().items()
        return {key: one for key, one in seen if one.state == GcsNodeInfo.ALIVE}

    def ever_seen(self) -> dict[str, GcsNodeInfo]:
        """Nodes that there are and were, by id."""
        found = GcsClient(address=self.address).get_all_node_info(timeout=30)
        return {key.hex(): one for key, one in found.items()}

    def close(self) -> None:
        """Ends every process of the cluster and waits for their end."""
        wait_until(lambda: not _end(marked(self.mark)), "processes of the cluster stayed", 60)
        for node in self.nodes:
            node.process.wait()

    def _start(self, *words: str, env: Mapping[str, str]) -> LocalNode:
        before = set(self.alive()) if self.nodes else set()
        with (self.folder / f"node-{len(self.nodes)}.log").open("w") as said:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "tests.e2e.patient_ray",
                    "start", "--block", "--disable-usage-stats",
                    "--min-worker-port=0", "--max-worker-port=0",
                    "--dashboard-agent-listen-port=0",
                    f"--object-store-memory={OBJECT_STORE}",
                    *words,
                ],
                cwd=ROOT, env=dict(env), stdout=said, stderr=subprocess.STDOUT, text=True,
                start_new_session=True,
            )  # fmt: skip

        def found() -> set[str]:
            assert process.poll() is None, Path(said.name).read_text()
            with contextlib.suppress(Exception):
                return set(self.alive()) - before
            return set()

        node = LocalNode(process, "")
        self.nodes.append(node)
        (node.node_id,) = wait_until(found, f"a node did not start: {said.name}", 300)
        return node


@contextlib.contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """A cluster without nodes, ended with the block."""
    # Sockets need short paths.
    with tempfile.TemporaryDirectory(prefix="fr-", ignore_cleanup_errors=True) as folder:
        cluster = LocalCluster(Path(folder))
        with _reaper(cluster.mark):
            try:
                yield cluster
            finally:
                cluster.close()


@contextlib.contextmanager
def _reaper(mark: str) -> Iterator[None]:
    """A process that ends a cluster when this one is killed: its input ends then."""
    command = [sys.executable, "-m", "tests.e2e.clusters", mark]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True
    ) as process:
        yield
        assert process.stdin is not None
        process.stdin.close()


def start_autoscaling_head(
    cluster: LocalCluster, worker_types: Mapping[str, Mapping[str, Any]], *words: str
) -> LocalNode:
    """A head whose autoscaler (v2) starts raylets of these types on this machine.

    `ray.cluster_utils.AutoscalingCluster` reads a file that the wheel lacks, and stops every Ray of
    the machine.
    """
    commands = ("setup_", "head_setup_", "worker_setup_", "head_start_ray_", "worker_start_ray_")
    config = {
        "cluster_name": "test",
        "max_workers": sum(one["max_workers"] for one in worker_types.values()),
        "provider": {
            "type": "external",
            "module": "tests.e2e.node_provider.PatientNodeProvider",
            "head_node_id": _FAKE_HEAD,
            "launch_multiple": True,
            "gcs_address": cluster.address,
        },
        "available_node_types": {
            **{name: dict(one) for name, one in worker_types.items()},
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        **{f"{one}commands": [] for one in commands},
    }
    path = cluster.folder / "autoscaling.json"
    path.write_text(json.dumps(config))
    env = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _FAKE_HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _FAKE_HEAD,
    }
    return cluster.start_head(f"--autoscaling-config={path}", *words, env=env)


def marked(mark: str) -> list[int]:
    """Processes that carry the mark of a cluster."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def descendants(pid: int) -> list[int]:
    """Processes below one, at any depth."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        children.setdefault(parent_of(int(entry.name)), []).append(int(entry.name))
    found, level = [], [pid]
    while level:
        level = [child for one in level for child in children.get(one, ())]
        found += level
    return found


def _end(pids: Sequence[int]) -> Sequence[int]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return pids


if __name__ == "__main__":
    sys.stdin.read()
    while _end(marked(sys.argv[1])):
        time.sleep(0.5)
