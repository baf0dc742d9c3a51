"""A training of two workers on the cluster of RAY_ADDRESS; run by a test.

Usage: python -m tests.e2e.two_hosts_run FOLDER

Writes FOLDER/report.json: the loss of every step, and the addresses of the workers' nodes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train

from forge_ray.artifacts import ArtifactStore
from forge_ray.gr.train import train_generator
from forge_ray.launch.connect import connected
from tests.gr.chains import chain_dataset, grid_table
from tests.gr.test_train import small


class Homes(ray.train.UserCallback):
    """Notes the node of every worker; told in Ray Train's controller."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        nodes = [one["node_labels"]["ray.io/node-id"] for one in metrics]
        self._path.write_text(json.dumps(nodes))


def main(folder: Path) -> None:
    store = ArtifactStore(folder / "store")
    with connected():
        result = train_generator(
            small("num_workers=2", "engine.zero_stage=2", "validation.aside=false"),
            chain_dataset(store),
            grid_table(),
            store=store,
            run_dir=str(folder / "runs"),
            name="run",
            callbacks=[Homes(folder / "homes.json")],
        )
        addresses = {one["NodeID"]: one["NodeManagerAddress"] for one in ray.nodes()}
    homes = [addresses[one] for one in json.loads((folder / "homes.json").read_text())]
    report = {"losses": result.losses.tolist(), "homes": homes}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
