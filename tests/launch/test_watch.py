from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from ray._private import worker as ray_worker

from forge_ray.launch import watch


@pytest.mark.ray
def test_a_living_ray_has_no_dead_process(ray_local) -> None:
    node = ray_worker._global_node
    kinds = set(node.all_processes)
    assert {"gcs_server", "raylet"} <= kinds
    assert watch.dead_process() == ""


@pytest.mark.parametrize(("dead", "told"), [(["raylet"], ["raylet"]), (["log_monitor"], [])])
def test_only_a_vital_process_ends_the_command(monkeypatch, dead, told) -> None:
    node = SimpleNamespace(dead_processes=lambda: [(kind, None) for kind in dead])
    monkeypatch.setattr(watch, "_POLL_S", 0.01)
    monkeypatch.setattr(ray_worker, "_global_node", node)
    heard: list[str] = []
    done = threading.Event()

    def end(name: str) -> None:
        heard.append(name)
        done.set()

    with watch.watching(end):
        done.wait(5 if told else 0.2)
    assert heard == told
