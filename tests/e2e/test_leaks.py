"""What pruned trials leave behind on a cluster that lives on: nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GATED, STOPPED = 20, 10
SWEEP = """
name: pruned
synthetic: {num_items: 300, num_users: 400, vector_dim: 16, branching: [4, 4], users_per_shard: 100}
points:
- {gr.engine.learning_rate: 0.01}
%s
sampler: {kind: grid}
num_trials: null
max_concurrent: 2
order: planned
sid: {quantizer: {levels: 2, codebook_size: 32}}
gr:
  model: {hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 64}
  engine: {global_batch: 32, warmup_steps: 2}
  max_steps: 400
  max_history: 10
  cpus_per_worker: 0.5
  validation: {every: 40, users: 100, ks: [5, 10]}
evaluation: {users: 100}
# Random codes gain less, fitted ones more; of equally bad trainings all but one in twenty stop.
gate: {warmup: 100, min_gain: 0.4}
asha: {grace_steps: 40, reduction_factor: 20, min_earlier: 1}
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_pruned_trials_leave_nothing(tmp_path: Path) -> None:
    gated = [f"- {{sid.quantizer.kind: random, sid.seed: {one}}}" for one in range(GATED)]
    stopped = [f"- {{gr.engine.learning_rate: {one + 1}.0e-9}}" for one in range(STOPPED)]
    (tmp_path / "sweep.yaml").write_text(SWEEP % "\n".join([*stopped, *gated]))
    words = [str(tmp_path / "sweep.yaml"), str(tmp_path)]
    command = [sys.executable, "-m", "tests.e2e.leaks_run", *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        command,
        cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=2900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    ends = [tuple(one) for one in report["states"]]
    assert ends.count(("pruned", "gate")) == GATED
    assert ends.count(("pruned", "asha")) >= STOPPED
    before, after = report["before"], report["after"]
    assert after["processes"] == []
    assert after["actors"] == before["actors"]
    assert after["groups"] == []
    assert after["free"] == before["free"]
    assert after["objects"] <= before["objects"]
