"""The doctor on real Rays: one node here, several raylets in a process of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError
from typer.testing import CliRunner

from forge_ray.cli.cluster import app as cluster_app
from forge_ray.cli.sweep import app as sweep_app
from forge_ray.errors import ClusterError
from forge_ray.launch import preflight
from forge_ray.launch.preflight import check_before_sweep
from forge_ray.launch.preflight_network import Node
from forge_ray.launch.preflight_node import look

SWEEP = """
name: tiny
space: {sid.quantizer.levels: {int: [2, 3]}}
gr: {num_workers: 4, cpus_per_worker: 64}
"""


@pytest.mark.ray
def test_on_one_node_no_task_is_started(ray_local, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "probing", None)
    store = tmp_path / "store"
    check_before_sweep([str(store)])
    assert list(store.iterdir()) == []


@pytest.mark.ray
def test_a_sweep_says_that_its_cluster_is_open_and_goes_on(
    ray_local, tmp_path: Path, monkeypatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(preflight.logger, "warning", lambda text, *words: said.append(words[0]))
    check_before_sweep([str(tmp_path)])
    assert "auth" not in said  # the Ray that we start has a token
    monkeypatch.setattr(preflight, "authentication_mode", lambda: "disabled")
    check_before_sweep([str(tmp_path)])
    assert said.count("auth") == 1


def test_a_lost_node_stops_a_sweep_with_its_name(tmp_path: Path, monkeypatch) -> None:
    nodes = [Node(id=name, name=name, resources={}) for name in ("here", "mute", "lost")]
    report = look({}, name="here", is_thorough=False)

    class Probe:
        """Of a node: what it answers to `look` and to `clock`."""

        def __init__(self, *answers: object) -> None:
            self.look, self.clock = (
                SimpleNamespace(remote=lambda *_, _given=one, **__: _given) for one in answers
            )

    dead = RayActorError("its node is gone")
    probes = {
        "here": Probe(report, time.time()),
        "mute": Probe(dead, dead),
        "lost": Probe(report, dead),
    }

    def get(answer: object, timeout: float) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(preflight, "ray", SimpleNamespace(get=get))
    monkeypatch.setattr(preflight, "alive_nodes", lambda: nodes)
    monkeypatch.setattr(preflight, "probing", lambda _: contextlib.nullcontext(probes))
    with pytest.raises(ClusterError, match=r"nodes: every node must run a task .*mute: .*lost: "):
        check_before_sweep([str(tmp_path)])


@pytest.mark.ray
def test_a_store_that_cannot_be_written_stops_a_sweep_before_anything(
    ray_local, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("no folder")
    with pytest.raises(ClusterError, match="storage: --store and the sweep's folder must"):
        check_before_sweep([str(tmp_path / "taken")])
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP)
    done = CliRunner().invoke(sweep_app, ["run", str(file), "--store", str(tmp_path / "taken")])
    assert isinstance(done.exception, ClusterError)


@pytest.mark.ray
def test_the_command_names_what_no_cluster_can_hold(ray_local, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP)
    words = ["doctor", str(file), "--store", str(tmp_path / "store"), "--json"]
    done = CliRunner().invoke(cluster_app, words)
    found = {one["check"]: one for one in json.loads(done.stdout)}
    assert done.exit_code == 1
    assert [name for name, one in found.items() if one["verdict"] == "failed"] == ["resources"]
    assert "64" in found["resources"]["text"]
    assert found["nodes"]["text"] == "one node answers"
    assert found["network"]["text"] == "one node"
    assert found["auth"]["verdict"] == "ok"


CLUSTER = """
import dataclasses, json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(num_cpus=1, resources={"extra": 1})
from forge_ray.launch.connect import connect, disconnect
from forge_ray.launch import preflight
from forge_ray.launch.preflight_node import leave_mark
connect(address=cluster.address)
store = sys.argv[1]
found = {"sound": preflight.examine([store])}
preflight.check_before_sweep([store])
# The driver's file is put where no node looks: what a folder that is not shared looks like.
preflight.leave_mark = lambda store: leave_mark(store + "-of-the-driver")
preflight.remove_mark = lambda store, mark: None
found["apart"] = preflight.examine([store])
print(json.dumps({name: [dataclasses.asdict(one) for one in rows] for name, rows in found.items()}))
disconnect()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_three_nodes_are_asked_and_meet(tmp_path: Path) -> None:
    env = {**os.environ, "RAY_raylet_start_wait_time_s": "300"}
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(tmp_path / "store")],
        env=env,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    sound = {one["check"]: one for one in found["sound"]}
    assert sound["nodes"]["text"] == "3 nodes answer"
    assert sound["network"]["text"] == "gloo all-reduce over 3 nodes"
    assert sound["storage"]["text"].endswith("read and written from 4 nodes")
    assert sound["clocks"]["text"] == "within 0.0 s"
    assert {one["verdict"] for name, one in sound.items() if name != "auth"} <= {"ok", "warning"}
    apart = next(one for one in found["apart"] if one["check"] == "storage")
    assert apart["verdict"] == "failed"
    assert "different disks" in apart["text"]
    assert not list((tmp_path / "store").iterdir())
