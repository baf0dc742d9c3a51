"""Nodes are lost under a sweep: with a notice, without one, and the head with all that it knew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.sweep.ledger import SweepRecords, TrialRecord
from tests.e2e.clusters import LocalCluster, LocalNode, local_cluster
from tests.e2e.faults import TinySweep, rows_told, steps, trains
from tests.e2e.head import token_head
from tests.e2e.test_jobs import answer
from tests.gr.processes import wait_until
from tests.tiny_sweep import SWEEP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EVERY, STEPS = 100, 600
LONG = f"""
name: tiny
synthetic: {{num_items: 300, num_users: 400, vector_dim: 16, branching: [4, 4]}}
space:
  sid.quantizer.codebook_size: {{choice: [32, 64]}}
sampler: {{kind: grid}}
num_trials: null
max_concurrent: 2
sid: {{quantizer: {{levels: 2}}}}
gr:
  model: {{hidden_size: 64, num_layers: 3, num_heads: 2, intermediate_size: 256}}
  engine: {{global_batch: 96}}
  max_steps: {STEPS}
  max_history: 10
  worker_resources: {{fakegpu: 1}}
  keep_checkpoints: 1000
  validation: {{every: {EVERY}, users: 50, ks: [5, 10], aside: false}}
evaluation: {{users: 100}}
gate: {{mode: "off"}}
asha: {{enabled: false}}
resources:
  driver_labels: {{pool: "!spot"}}
  stage_labels: {{pool: "!spot"}}
"""
UNHURRIED = ("gr.max_steps=1000", "gr.validation.every=50")
"""Trainings that can be met half-way."""
SAVED = re.compile(r"saved at step (\d+), going on elsewhere")


def home(one: TrialRecord) -> str:
    """Node of a training, as its last row says."""
    return str(one.places[-1].get("train", {}).get("ray.io/node-id", ""))


def checkpoints(sweep: TinySweep, one: TrialRecord) -> list[int]:
    """Steps of a training's committed checkpoints."""
    folder = sweep.ledger.folder / "runs" / f"trial-{one.key[:16]}" / "checkpoints"
    found = [json.loads(path.read_text()) for path in folder.glob("*/checkpoint.json")]
    return sorted(one["progress"]["step"] for one in found)


def trials(sweep: TinySweep) -> list[TrialRecord]:
    return list(sweep.ledger.read().trials.values())


def test_a_killed_and_a_drained_node_cost_no_trial(tmp_path: Path) -> None:
    sweep = TinySweep.make(tmp_path / "sweep", LONG)
    with local_cluster() as cluster:
        cluster.start_head("--num-cpus=2", "--include-dashboard=false")
        words = ("--num-cpus=1", '--resources={"fakegpu": 1}', "--labels=pool=spot")
        # Two to be lost, and two that take over.
        nodes = {one.node_id: one for one in (cluster.add_node(*words) for _ in range(4))}
        driver = sweep.start(env=cluster.env)
        sweep.wait(driver, lambda _: len(trained_on(sweep, nodes)) == 2, "two trainings")
        killed, drained = trials(sweep)
        first = [home(one) for one in (killed, drained)]
        nodes[first[0]].kill()
        cluster.drain(nodes[first[1]], 120)
        (saved,) = wait_until(lambda: saved_steps(cluster), "no end at the notice", 300)
        # The workers ended at their checkpoint: what came after it would be lost.
        assert checkpoints(sweep, drained)[-1] == saved
        sweep.finish(driver)
        assert saved_steps(cluster) == [saved]
    ended = trials(sweep)
    assert [one.state for one in ended] == ["complete"] * 2
    # The trials themselves lived on the head, and started no training twice.
    assert [len(one.attempts) for one in ended] == [1, 1]
    for one, before in zip(ended, first, strict=True):
        assert home(one) not in ("", *first), before
        assert steps(one) == list(range(EVERY, STEPS + 1, EVERY))
        assert len(losses(sweep, one)) == STEPS
    told = rows_told(sweep)
    # After the kill: from the newest checkpoint, whose own row came after it and may come again. A
    # training that went further back would tell more rows twice.
    assert told[killed.key] == sorted(told[killed.key])
    assert len(told[killed.key]) - len(set(told[killed.key])) <= 1
    # After the notice: no row twice.
    assert told[drained.key] == sorted(set(told[drained.key]))
    # It went on from the notice's checkpoint, and wrote every later one once.
    assert checkpoints(sweep, drained) == sorted({*range(EVERY, STEPS + 1, EVERY), saved})


def saved_steps(cluster: LocalCluster) -> list[int]:
    """Steps at which trainings ended because their node goes, as the trials' processes say."""
    said = "".join(one.read_text() for one in cluster.folder.glob("session_2*/logs/worker-*.err"))
    return [int(step) for step in SAVED.findall(said)]


def trained_on(sweep: TinySweep, nodes: dict[str, LocalNode]) -> set[str]:
    running = [one for one in trials(sweep) if one.state == "running" and one.history]
    return {home(one) for one in running} & set(nodes)


def losses(sweep: TinySweep, one: TrialRecord) -> Any:
    store = ArtifactStore(sweep.folder / "store")
    found = np.load(store.open(one.artifacts["model"]).local("losses.npy"))
    assert np.isfinite(found).all()
    return found


def start_small(cluster: LocalCluster) -> LocalNode:
    return cluster.start_head("--num-cpus=2", "--include-dashboard=false")


def half_way(records: SweepRecords) -> bool:
    """Whether a trial is complete and another trains."""
    return any(one.state == "complete" for one in records.trials.values()) and trains(records)


def assert_finished_once(sweep: TinySweep, before: list[TrialRecord]) -> None:
    """The sweep is over, and what had finished before was not repeated."""
    after = sweep.ledger.read().trials
    assert sorted(one.state for one in after.values()) == ["complete", "complete", "pruned"]
    for told in rows_told(sweep).values():
        assert told == sorted(set(told))
    assert before
    for one in before:
        assert (after[one.key].state, after[one.key].value) == (one.state, one.value)
        assert len(after[one.key].attempts) == 1


def test_a_sweep_outlives_its_head(tmp_path: Path) -> None:
    sweep = TinySweep.make(tmp_path / "sweep", SWEEP)
    with local_cluster() as cluster:
        head = start_small(cluster)
        driver = sweep.start(*UNHURRIED, env=cluster.env)
        sweep.wait(driver, half_way, "a complete trial and a training")
        before = sweep.ledger.read().finished()
        head.kill()
        # A driver without its cluster ends: a job that stayed would never be tried again.
        assert driver.wait(timeout=300) != 0
    with local_cluster() as cluster:
        start_small(cluster)
        sweep.finish(sweep.start(*UNHURRIED, env=cluster.env))
    assert_finished_once(sweep, before)


@pytest.mark.timeout(3600)
def test_a_submitted_sweep_outlives_its_head(tmp_path: Path) -> None:
    sweep = TinySweep.make(tmp_path / "sweep", SWEEP)
    submit = ["submit", "sweep.yaml", *UNHURRIED, "--store", str(sweep.folder / "store")]
    submit += ["--driver-cpus", "0.5"]
    with token_head() as head:
        answer(head, sweep.folder, *submit)
        wait_until(lambda: half_way(sweep.ledger.read()), "no second training", 900)
        head.kill()
        before = sweep.ledger.read().finished()
        assert len(before) < 3
    # Another head, which knows of no job; the sweep is what lies in the store.
    with token_head() as fresh:
        seen, _ = answer(fresh, sweep.folder, *submit, "--wait")
    assert f"3 trials, {len(before)} finished" in seen
    assert_finished_once(sweep, before)
