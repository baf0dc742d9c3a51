"""A sweep on a cluster that has no GPU until a training asks for one, and none when it is over.

The nodes are raylets of this machine that claim `GPU: 1` and a resource `fakegpu`. Torch here has
no GPU, so workers ask for the latter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge_ray.config import to_mapping
from forge_ray.sweep.config import AutoscaledNodes
from tests.e2e.clusters import (
    OBJECT_STORE,
    LocalCluster,
    local_cluster,
    start_autoscaling_head,
)
from tests.e2e.faults import TinySweep
from tests.gr.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GPU_NODE = AutoscaledNodes(
    max_nodes=2, cpus=1, gpus=1, resources={"fakegpu": 1.0}, labels={"pool": "spot"}
)
NODE_TYPE: dict[str, Any] = {
    "resources": {"CPU": 1, "GPU": 1, "fakegpu": 1, "object_store_memory": OBJECT_STORE},
    "labels": dict(GPU_NODE.labels),
    "node_config": {},
    "min_workers": 0,
    "max_workers": GPU_NODE.max_nodes,
}
SWEEP = """
name: tiny
synthetic: {num_items: 300, num_users: 400, vector_dim: 16, branching: [4, 4], users_per_shard: 100}
points:
- {sid.quantizer.kind: random, sid.quantizer.codebook_size: 32}
- {sid.quantizer.kind: random, sid.quantizer.codebook_size: 64}
sampler: {kind: grid}
num_trials: null
max_concurrent: null
sid: {quantizer: {levels: 2}}
gr:
  model: {hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 64}
  engine: {global_batch: 32}
  max_steps: 40
  max_history: 10
  worker_resources: {fakegpu: 1}
  worker_labels: {pool: spot}
  validation: {every: 20, users: 50, ks: [5, 10], aside: false}
evaluation: {users: 100}
gate: {warmup: 0}
asha: {enabled: false}
resources:
  driver_labels: {pool: "!spot"}
  stage_labels: {pool: "!spot"}
"""
GROWN = "space={sid.quantizer.codebook_size: {choice: [32, 64]}}"


@pytest.fixture
def cluster() -> Any:
    with local_cluster() as found:
        start_autoscaling_head(
            found, {"gpu": NODE_TYPE}, "--num-cpus=2", "--include-dashboard=false"
        )
        yield found


def gpu_nodes(cluster: LocalCluster) -> set[str]:
    return {key for key, one in cluster.alive().items() if "fakegpu" in one.resources_total}


def test_gpu_nodes_come_for_trainings_and_go(cluster: LocalCluster, tmp_path: Path) -> None:
    sweep = TinySweep.make(tmp_path / "sweep", SWEEP)
    # Without this the trainings could never be placed, as far as anyone knows.
    output = sweep.finish(sweep.start(GROWN, env=cluster.env), code=2)
    assert "resources must fit one trial on the cluster, got train" in output
    autoscaled = f"resources.autoscaled.gpu={to_mapping(GPU_NODE)}".replace("'", '"')

    # Designs that the gate ends cause no node to start.
    sweep.finish(sweep.start(autoscaled, env=cluster.env))
    ended = sweep.ledger.read().trials.values()
    assert [(one.state, one.pruned_by) for one in ended] == [("pruned", "gate")] * 2
    assert len(cluster.ever_seen()) == 1

    output = sweep.finish(sweep.start(autoscaled, GROWN, env=cluster.env))
    assert "the cluster holds 2 trials at a time" in output
    trained = [one for one in sweep.ledger.read().trials.values() if one.state == "complete"]
    assert len(trained) == 2
    homes = set()
    for one in trained:
        (places,) = one.places
        assert places["train"]["pool"] == "spot"
        homes.add(places["train"]["ray.io/node-id"])
        for stage in ("fit", "score", "evaluate"):
            assert "pool" not in places[stage]
    assert len(homes) == 2
    wait_until(lambda: not gpu_nodes(cluster), "idle nodes stayed", 120)
    assert len(cluster.ever_seen()) == 1 + 2
