"""Two nodes that ask for a token, one of which is drained; run by a test, as it needs its own Ray.

Usage: RAY_AUTH_MODE=token RAY_AUTH_TOKEN=… python -m tests.launch.drain_run

Prints what each call of the command that manifests hold returned and said, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from ray._private import services
from ray.cluster_utils import Cluster

from tests.gr.elastic_run import patient_get_node


def drain(address: str, *, machine: str, **environment: str) -> tuple[int, str]:
    """The command, as a pod's or machine's name tells its node."""
    words = ["-m", "forge_ray.launch.drain", "--seconds", "100", "--address", address]
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "RAY_CLOUD_INSTANCE_ID": machine, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stderr


def main() -> None:
    services.get_node = patient_get_node
    # Two raylets of one address: they differ by the names of their machines only.
    first, second = (
        {"env_vars": {"RAY_CLOUD_INSTANCE_ID": f"machine-{one}"}, "num_cpus": 1} for one in "ab"
    )
    nodes = Cluster(initialize_head=True, head_node_args=first | {"include_dashboard": False})
    try:
        nodes.add_node(**second)
        address = nodes.address
        seen = {
            "wrong token": drain(address, machine="machine-b", RAY_AUTH_TOKEN="another" * 5),
            "stranger": drain(address, machine="machine-c"),
            "drained": drain(address, machine="machine-b"),
            "gone": drain(address, machine="machine-b"),
        }
    finally:
        nodes.shutdown()
    print(json.dumps(seen))  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main()
