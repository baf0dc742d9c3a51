"""A sweep of pruned trials on a Ray of its own, and what is left of them; run by a test.

Usage: python -m tests.e2e.leaks_run SWEEP FOLDER

The driver still lives when it looks: at its end Ray would clean up what belongs to it. Writes
FOLDER/report.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.state import list_actors, list_placement_groups

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.launch.connect import connected
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.sweep import run_sweep
from tests.e2e.clusters import descendants

NAMES = ("ImplicitFunc", "RayTrainWorker", "TrainController", "GroupCleaner", "Validation")
"""Of processes that a trial starts."""
WARM_UP = (
    "name=warm",
    "points=[{gr.engine.learning_rate: 0.02}]",
    "gr.max_steps=40",
    "asha.enabled=false",
)


def address() -> str:
    """Of this Ray: there may be others on the machine."""
    return str(ray.get_runtime_context().gcs_address)


def actors() -> list[str]:
    found = list_actors(address(), filters=[("state", "!=", "DEAD")], limit=1000)
    return sorted(one.class_name for one in found)


def groups() -> list[str]:
    found = list_placement_groups(address(), filters=[("state", "!=", "REMOVED")], limit=1000)
    return [f"{one.state} {one.bundles}" for one in found]


def processes() -> list[str]:
    found = []
    for pid in descendants(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it ended meanwhile
        found += [command for name in NAMES if name in command]
    return sorted(found)


def objects() -> float:
    """Bytes of the object store in use."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return total["object_store_memory"] - free.get("object_store_memory", 0.0)


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def settled(look: Callable[[], Any], wanted: Any, seconds: float = 60) -> Any:
    """What is seen once it is as wanted, or at last."""
    deadline = time.monotonic() + seconds
    while (seen := look()) != wanted and time.monotonic() < deadline:
        time.sleep(1)
    return seen


def main(sweep: Path, folder: Path) -> None:
    config = load_config(SweepConfig, path=sweep)
    warm = load_config(SweepConfig, path=sweep, overrides=WARM_UP)
    with connected(address="local", num_cpus=2):
        # What Ray starts once, for all that come: its actors for Ray Data and Ray Train.
        run_sweep(warm, ArtifactStore(folder / "store"))
        settled(processes, [])
        before = {"actors": actors(), "objects": objects(), "free": free_cpus()}
        result = run_sweep(config, ArtifactStore(folder / "store"))
        states = [(one.state, one.pruned_by) for one in result.records.trials.values()]
        after = {
            "actors": settled(actors, before["actors"]),
            "groups": settled(groups, []),
            "processes": settled(processes, []),
            "objects": settled(objects, before["objects"]),
            "free": settled(free_cpus, before["free"]),
        }
    report = {"states": states, "before": before, "after": after}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
