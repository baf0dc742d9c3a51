"""What follows the trials of a session."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.sweep import sweep
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import Ledger, SweepRecords
from forge_ray.sweep.runner import RunOutcome
from tests.sweep.records import records, trial

CONFIG = SweepConfig(name="s", space={"sid.quantizer.levels": {"int": [2, 3]}}, finalize=True)
STOPPED = {"reason": "budget.max_cost: 2 of 2 USD are spent", "next": [], "left": 1}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Splits that were evaluated."""
    splits: list[str] = []

    def floors(dataset: Any, split: str, *_: Any) -> dict[str, Any]:
        splits.append(split)
        return {"popularity": {}}

    monkeypatch.setattr(sweep, "evaluate_floors", floors)
    monkeypatch.setattr(sweep, "_finalize", lambda *_: splits.append("test"))
    monkeypatch.setattr(sweep, "stay_on", lambda _: None)
    monkeypatch.setattr(sweep, "open_dataset", lambda *_: None)
    monkeypatch.setattr(sweep, "make_report", lambda *_: tmp_path / "report.html")
    return splits


@pytest.mark.parametrize(
    ("is_complete", "stopped", "has_winner", "expected"),
    [
        (True, None, True, ["validation", "test"]),
        (True, None, False, ["validation"]),
        (False, STOPPED, True, ["validation"]),
        (False, STOPPED, False, []),
        (False, None, True, []),  # Ctrl-C ends at once
    ],
)
def test_a_sweep_at_its_budget_is_seen_beside_the_floors(
    is_complete: bool,
    stopped: dict[str, Any] | None,
    has_winner: bool,
    expected: list[str],
    called: list[str],
    store: ArtifactStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclasses.dataclass
    class Job:
        config: SweepConfig = dataclasses.field(default_factory=lambda: CONFIG)
        ledger: Ledger = dataclasses.field(default_factory=lambda: Ledger(tmp_path))
        command: Any = ()

    ended = trial(0, value=0.1) if has_winner else trial(0, state="failed")
    found: SweepRecords = dataclasses.replace(records(ended), floors={}, stopped=stopped)
    monkeypatch.setattr(sweep, "make_job", lambda *_: Job())
    outcome = RunOutcome(records=found, is_complete=is_complete)
    monkeypatch.setattr(sweep, "run_trials", lambda _: outcome)
    sweep.run_sweep(CONFIG, store)
    assert called == expected
    assert bool(Ledger(tmp_path).read().floors) == ("validation" in expected)
