"""A training on a cluster whose nodes come and go; run by a test, as it needs a Ray of its own.

Usage: python -m tests.gr.elastic_run SCENARIO FOLDER

`resized`: one to two workers; a second node joins, is told to go, and goes. `drained`: one worker
on one of two nodes, which is drained. Writes FOLDER/report.json: what was seen, in order.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private.node import Node
from ray._private.services import get_node
from ray.cluster_utils import Cluster

from forge_ray.errors import StoppedError
from forge_ray.launch.connect import connect
from tests.gr.processes import parent_of, wait_until, worker_pids
from tests.gr.test_train import run

EVERY = 505
"""Steps between validation points; notices are answered at multiples of ten."""
LONG = ("max_steps=1000000", "stop.loss_steps=9999")


def patient_get_node(address: str, node_id: str) -> dict[str, Any]:
    """What Ray knows of a node that starts; Ray itself gives up after 30 seconds."""

    def found() -> dict[str, Any]:
        with contextlib.suppress(RuntimeError):
            return get_node(address, node_id)
        return {}

    return wait_until(found, "a node did not start")


@contextlib.contextmanager
def cluster(*, num_cpus: int) -> Iterator[Cluster]:
    """A cluster of one node, the driver's, that others may join."""
    services.get_node = patient_get_node
    head = {"num_cpus": num_cpus, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    connect(address=nodes.address)
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@contextlib.contextmanager
def training(folder: Path, *overrides: str) -> Iterator[None]:
    """A run beside the block, stopped at its end."""

    def train() -> None:
        with contextlib.suppress(StoppedError):
            run(folder, "run", *LONG, *overrides)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    yield
    (folder / "runs/run/stop").touch()
    thread.join(timeout=300)
    assert not thread.is_alive()


def manifests(folder: Path) -> list[dict[str, Any]]:
    """Committed checkpoints, oldest first."""
    found = []
    for path in sorted((folder / "runs/run/checkpoints").glob("*/checkpoint.json")):
        with contextlib.suppress(FileNotFoundError):  # replaced by a newer one meanwhile
            found.append(json.loads(path.read_text()))
    return found


def first(folder: Path, is_wanted: Callable[[int, int], bool]) -> tuple[int, int]:
    """World size and step of the first checkpoint of a kind; waits for it."""

    def found() -> list[tuple[int, int]]:
        seen = [(one["world_size"], one["progress"]["step"]) for one in manifests(folder)]
        return [one for one in seen if is_wanted(*one)]

    return wait_until(found, f"no such checkpoint in {folder}")[0]


def drain(address: str, node: Node, seconds: int) -> None:
    """What a cloud's notice becomes: `ray drain-node`."""
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node",
        "--address", address,
        "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "the spot market wants it back",
        "--deadline-remaining-seconds", str(seconds),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


def resized(folder: Path) -> dict[str, Any]:
    with cluster(num_cpus=1) as nodes:
        with training(folder, "num_workers=1", "max_workers=2", f"validation.every={EVERY}"):
            seen = [first(folder, lambda size, _: size == 1)]
            second = nodes.add_node(num_cpus=1)
            seen.append(first(folder, lambda size, step: size == 2 and step > seen[-1][1]))
            drain(nodes.address, second, 600)
            seen.append(first(folder, lambda _, step: step > seen[-1][1] and step % EVERY != 0))
            nodes.remove_node(second)
            seen.append(first(folder, lambda size, step: size == 1 and step > seen[-1][1]))
        return {"seen": seen, "last": manifests(folder)[-1]}


def drained(folder: Path) -> dict[str, Any]:
    # No CPU on the driver's node: workers are on the two that come.
    with cluster(num_cpus=0) as nodes:
        raylets = {}
        for _ in range(2):
            node = nodes.add_node(num_cpus=1)
            raylets[node.all_processes["raylet"][0].process.pid] = node

        def homes() -> list[Node]:
            """Nodes of the workers: a raylet is the parent of its workers."""
            return [raylets[pid] for pid in map(parent_of, worker_pids()) if pid in raylets]

        with training(folder, f"validation.every={EVERY}", "keep_checkpoints=1000"):
            first(folder, lambda _, step: step > 0)
            (before,) = homes()
            drain(nodes.address, before, 45)
            _, saved = first(folder, lambda _, step: step % EVERY != 0)
            wait_until(lambda: homes() and before not in homes(), "no worker moved")
            newest = manifests(folder)[-1]["progress"]["step"]
            first(folder, lambda _, step: step > newest)
            extra = [one["progress"]["step"] for one in manifests(folder)]
        return {
            "saved": saved,
            "extra": [step for step in extra if step % EVERY],
            "last": manifests(folder)[-1],
        }


if __name__ == "__main__":
    report = {"resized": resized, "drained": drained}[sys.argv[1]](Path(sys.argv[2]))
    Path(sys.argv[2], "report.json").write_text(json.dumps(report))
