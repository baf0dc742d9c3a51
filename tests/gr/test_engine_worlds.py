"""Resuming on another number of workers: the curve goes on as if nothing had changed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    f"{stage}-{precision}" for stage, precision in itertools.product(range(4), ("fp32", "bf16"))
]
BY_CASE = dict[str, dict[str, Any]]


def train(
    folder: Path, cases: list[str], *, world: int, steps: tuple[int, int], saved: int = 0
) -> BY_CASE:
    """Runs `world` processes of `engine_worlds.py`; starting them takes longer than the cases."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.gr.engine_worlds"]
    store = folder / f"store-{world}-{steps[0]}"
    words = [*(str(word) for word in (world, store, folder, *steps, saved)), *cases]
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
    answer: BY_CASE = json.loads(results[0][0].splitlines()[-1])
    return answer


def halves(folder: Path, cases: list[str], before: int, after: int) -> tuple[BY_CASE, BY_CASE]:
    """Steps 1 to 4 on so many workers, then 5 to 8 on another number."""
    first = train(folder, cases, world=before, steps=(1, 4))
    return first, train(folder, cases, world=after, steps=(5, 8), saved=before)


def check(whole: dict[str, Any], first: dict[str, Any], second: dict[str, Any], case: str) -> None:
    assert second["start"] == pytest.approx(first["end"], rel=1e-6)
    tolerance = 1e-4 if case.endswith("fp32") else 2e-2
    assert first["losses"] + second["losses"] == pytest.approx(whole["losses"], rel=tolerance)
    # Without the optimiser's state the next updates would be those of a fresh AdamW.
    assert whole["losses"][-1] != pytest.approx(whole["losses"][4], rel=tolerance)


def test_two_workers_continue_as_one(tmp_path):
    case = "2-fp32"
    whole = train(tmp_path / "whole", [case], world=1, steps=(1, 8))
    first, second = halves(tmp_path / "halves", [case], 2, 1)
    check(whole[case], first[case], second[case], case)


def test_weights_spread_over_two_workers_train_as_whole_ones(tmp_path):
    """Rank 0 alone holds them all, where a checkpoint is written."""
    cases = [f"{stage}-fp32{model}" for stage in (0, 3) for model in ("", "-rq_transformer")]
    found = train(tmp_path, cases, world=2, steps=(1, 8))
    for model in ("", "-rq_transformer"):
        whole, spread = found[f"0-fp32{model}"], found[f"3-fp32{model}"]
        assert spread["losses"] == pytest.approx(whole["losses"], rel=1e-4)
        assert list(spread["weights"]) == list(whole["weights"])
        assert spread["weights"] == pytest.approx(whole["weights"], rel=1e-3)
        assert (spread["others"], whole["others"]) == (0, 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> BY_CASE:
    """Every case without an interruption."""
    return train(tmp_path_factory.mktemp("whole"), CASES, world=1, steps=(1, 8))


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["2to1", "1to2"])
def moved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[BY_CASE, BY_CASE]:
    """Every case on one number of workers, then on another."""
    return halves(tmp_path_factory.mktemp("moved"), CASES, *request.param)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
def test_every_stage_moves_both_ways(whole, moved, case):
    first, second = moved
    check(whole[case], first[case], second[case], case)
