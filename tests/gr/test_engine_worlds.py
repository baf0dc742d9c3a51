"""Resuming on another number of workers: the curve goes on as if nothing had changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def train(
    folder: Path, *, world: int, stage: int, precision: str, steps: tuple[int, int], saved: int = 0
) -> dict[str, Any]:
    """Runs `world` processes of `engine_worlds.py`."""
    store = folder / f"store-{world}-{steps[0]}-{saved}"
    (folder / "checkpoint").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.gr.engine_worlds"]
    words = [
        str(word) for word in (world, store, folder / "checkpoint", stage, precision, *steps, saved)
    ]
    workers = [
        subprocess.Popen(
            [*command, str(rank), *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    results = [worker.communicate(timeout=900) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), results[0][1][-3000:]
    answer: dict[str, Any] = json.loads(results[0][0].splitlines()[-1])
    return answer


def check(folder: Path, stage: int, precision: str, before: int, after: int) -> None:
    same = {"stage": stage, "precision": precision}
    (folder / "whole").mkdir()
    whole = train(folder / "whole", world=1, steps=(1, 8), **same)["losses"]
    first = train(folder, world=before, steps=(1, 4), **same)
    second = train(folder, world=after, steps=(5, 8), saved=before, **same)
    assert second["start"] == pytest.approx(first["end"], rel=1e-6)
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert first["losses"] + second["losses"] == pytest.approx(whole, rel=tolerance)
    # Without the optimiser's state the next updates would be those of a fresh AdamW.
    assert whole[-1] != pytest.approx(whole[4], rel=tolerance)


def test_two_workers_continue_as_one(tmp_path):
    check(tmp_path, 2, "fp32", 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_moves_both_ways(tmp_path, stage, precision, worlds):
    check(tmp_path, stage, precision, *worlds)
