"""Commands that read: no Ray is started."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge_ray.cli.sweep import app
from forge_ray.errors import ConfigError
from forge_ray.sweep.ledger import Ledger, SweepRecords
from forge_ray.sweep.sweep import SweepResult
from tests.sweep.records import METRIC, records, trial


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    (tmp_path / "s.yaml").write_text("name: demo\nspace: {a: {choice: [1, 2]}}\n")
    ledger = Ledger(tmp_path / "store" / "sweeps" / "demo")
    for number, key in enumerate("ab"):
        ledger.append("start", key=key, number=number, point={"a": number}, config={})
    ledger.append("row", key="a", stage="final", metrics={METRIC: 0.2, "ItemHit@10": 0.4})
    ledger.append("finish", key="a", state="complete", value=0.2)
    return [str(tmp_path / "s.yaml"), "--store", str(tmp_path / "store")]


def test_status_shows_trials_and_that_no_driver_runs(sweep: list[str]) -> None:
    content = json.loads(CliRunner().invoke(app, ["status", *sweep, "--json"]).stdout)
    assert [row["state"] for row in content["trials"]] == ["complete", "interrupted"]
    assert content["counts"]["complete"] == 1
    assert content["running"] is False
    text = CliRunner().invoke(app, ["status", *sweep]).output
    assert "interrupted" in text


def test_report_is_written_and_named(sweep: list[str]) -> None:
    content = json.loads(CliRunner().invoke(app, ["report", *sweep, "--json"]).stdout)
    assert Path(content["report"]).exists()
    assert content["ranking"][0][METRIC] == 0.2


def test_status_of_a_sweep_that_never_ran(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: new\nspace: {a: {choice: [1]}}\n")
    arguments = ["status", str(tmp_path / "s.yaml"), "--store", str(tmp_path), "--json"]
    assert json.loads(CliRunner().invoke(app, arguments).stdout)["trials"] == []


def test_remote_store_needs_a_folder(sweep: list[str]) -> None:
    result = CliRunner().invoke(app, ["status", sweep[0], "--store", "s3://bucket/x?region=none"])
    assert isinstance(result.exception, ConfigError)
    assert "folder must be set" in str(result.exception)


def run_that_left(
    found: SweepRecords, sweep: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    result = SweepResult(records=found, report=Path("report.html"), is_complete=True)
    monkeypatch.setattr("forge_ray.cli.sweep.connected", lambda **_: nullcontext())
    monkeypatch.setattr("forge_ray.sweep.sweep.run_sweep", lambda *_, **__: result)
    called = CliRunner().invoke(app, ["run", *sweep])
    return called.exit_code, called.output


def test_a_run_without_a_complete_trial_fails(sweep: list[str], monkeypatch) -> None:
    failed = [trial(1, state="failed", reason="[boom] x"), trial(2, state="failed", reason="y")]
    code, text = run_that_left(records(trial(0, state="pruned"), *failed), sweep, monkeypatch)
    assert code == 1
    assert "2 of 3 failed, the first with: [boom] x" in text
    code, text = run_that_left(records(*failed, trial(3, value=0.1)), sweep, monkeypatch)
    assert (code, "the first with" in text) == (0, False)
    code, _ = run_that_left(records(trial(0, state="pruned")), sweep, monkeypatch)
    assert code == 0


def test_an_end_at_the_budget_says_what_comes_next(sweep: list[str], monkeypatch) -> None:
    ahead = [{"trial": 2, "design": "rq_vae levels=3", "seconds": 9.0, "cost_usd": 0.5}]
    stopped = {"reason": "budget.max_cost: 2 of 2 USD are spent", "next": ahead, "left": 4}
    found = dataclasses.replace(records(trial(0, value=0.1)), stopped=stopped)
    _, text = run_that_left(found, sweep, monkeypatch)
    assert "stopped at the budget. budget.max_cost: 2 of 2 USD are spent" in text
    assert "next of 4 trials" in text
    assert "rq_vae levels=3" in text
    found = dataclasses.replace(found, stopped={**stopped, "next": []})
    assert "up to 4 trials that the sampler draws" in run_that_left(found, sweep, monkeypatch)[1]
