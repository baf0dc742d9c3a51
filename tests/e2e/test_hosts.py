"""DeepSpeed under Ray Train on two hosts, loopback addresses of this machine, equals one host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.clusters import LocalCluster, local_cluster

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ("127.0.0.2", "127.0.0.3")


def trained(cluster: LocalCluster, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    command = [sys.executable, "-m", "tests.e2e.two_hosts_run", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.env, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_hosts_train_as_one(tmp_path: Path) -> None:
    with local_cluster() as cluster:
        cluster.start_head("--num-cpus=2", "--include-dashboard=false")
        one = trained(cluster, tmp_path / "one")
    assert len(set(one["homes"])) == 1
    with local_cluster() as cluster:
        cluster.start_head("--num-cpus=0", "--include-dashboard=false")
        for host in HOSTS:
            cluster.add_node(f"--node-ip-address={host}", "--num-cpus=1")
        two = trained(cluster, tmp_path / "two")
    assert sorted(two["homes"]) == list(HOSTS)
    assert len(one["losses"]) == 60
    # The same shares of the same batches, summed by the same all-reduce.
    np.testing.assert_array_equal(two["losses"], one["losses"])
