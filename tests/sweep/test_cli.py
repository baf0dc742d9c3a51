"""Commands that read: no Ray is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge_ray.cli.sweep import app
from forge_ray.errors import ConfigError
from forge_ray.sweep.ledger import Ledger
from tests.sweep.records import METRIC


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
