"""Nodes that come and go: a run that moves or changes size trains on every sample once an epoch."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.stream import Cursor, SequenceStream
from forge_ray.gr.vocab import vocab_of
from tests.gr.chains import chain_dataset, grid_table
from tests.gr.test_train import small

ROOT = Path(__file__).resolve().parents[2]


def report_of(scenario: str, folder: Path) -> dict[str, Any]:
    """Runs `elastic_run.py`."""
    command = [sys.executable, "-m", "tests.gr.elastic_run", scenario, str(folder)]
    # Sockets need short paths, and the address file of another Ray is left alone.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:
        env = {**os.environ, "RAY_TMPDIR": short, "RAY_agent_register_timeout_ms": "600000"}
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=3500
        )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return answer


def check_samples(progress: dict[str, Any], folder: Path) -> None:
    """A run stands where one undisturbed worker, without Ray, stands after as many steps."""
    dataset = chain_dataset(ArtifactStore(folder / "store"))
    config = small()
    stream = SequenceStream(
        dataset.sequence_files("train"),
        dataset.filesystem,
        config.data,
        plan=config.plan,
        is_local=True,
    )
    batches = list(itertools.islice(stream.batches(Cursor()), progress["step"]))
    model = config.model.build(vocab_of(grid_table().codebook_sizes))
    targets = [model.num_targets(torch.from_numpy(batch.global_lengths)) for batch in batches]
    assert progress["tokens"] == sum(targets)
    assert Cursor(**progress["cursor"]) == batches[-1].following


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_cluster_that_grows_and_shrinks(tmp_path):
    report = report_of("resized", tmp_path)
    assert [size for size, _ in report["seen"]] == [1, 2, 2, 1]
    check_samples(report["last"]["progress"], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_drained_node_is_left_with_one_extra_checkpoint(tmp_path):
    report = report_of("drained", tmp_path)
    assert report["extra"] == [report["saved"]]
    assert report["last"]["progress"]["step"] > report["saved"]
    check_samples(report["last"]["progress"], tmp_path)
