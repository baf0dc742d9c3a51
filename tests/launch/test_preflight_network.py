"""Who takes part in which all-reduce; the reduction itself runs in `test_preflight`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import ray
from ray._private import state

from forge_ray.launch import preflight_network
from forge_ray.launch.preflight_network import Node, check_network

HEAD, DRIVER, GPU_A, GPU_B = (
    Node(id=name, name=name, resources=resources)
    for name, resources in [
        ("head", {}),
        ("driver", {"CPU": 8.0}),
        ("gpu-a", {"GPU": 8.0}),
        ("gpu-b", {"GPU": 8.0}),
    ]
)


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Each all-reduce that was asked for; that of NCCL is cut off."""
    found: list[tuple[str, list[str]]] = []

    def all_reduce(nodes: Sequence[Node], *, backend: str) -> str:
        found.append((backend, [one.id for one in nodes]))
        return "no route to host" if backend == "nccl" else ""

    monkeypatch.setattr(preflight_network, "all_reduce", all_reduce)
    return found


def free(monkeypatch: pytest.MonkeyPatch, **gpus: float) -> None:
    by_node = {name.replace("_", "-"): {"GPU": one} for name, one in gpus.items()}
    monkeypatch.setattr(state, "available_resources_per_node", lambda: by_node)


def test_nccl_is_tried_between_the_nodes_that_have_gpus(reduced, monkeypatch) -> None:
    free(monkeypatch, gpu_a=8.0, gpu_b=1.0)
    found = check_network([HEAD, DRIVER, GPU_A, GPU_B])
    assert reduced == [
        ("gloo", ["head", "driver", "gpu-a", "gpu-b"]),
        ("nccl", ["gpu-a", "gpu-b"]),
    ]
    assert found.verdict == "failed"
    assert "no nccl all-reduce over 2 nodes: no route to host" in found.text
    assert "NCCL_SOCKET_IFNAME" in found.text


def test_a_node_whose_gpus_are_held_is_not_waited_for(reduced, monkeypatch) -> None:
    free(monkeypatch, gpu_a=8.0, gpu_b=0.5)
    found = check_network([GPU_A, GPU_B])
    assert reduced == [("gloo", ["gpu-a", "gpu-b"])]
    assert (found.verdict, found.text) == ("ok", "gloo all-reduce over 2 nodes")


@pytest.mark.ray
def test_ray_says_what_is_free_on_a_node(ray_local: None) -> None:
    here = ray.get_runtime_context().get_node_id()
    assert state.available_resources_per_node()[here]["CPU"] >= 1
