"""`forge-ray data` from the outside: commands, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from forge_ray.cli.data import app
from forge_ray.errors import ConfigError, DataError
from tests.data.al_gr import files

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
runner = CliRunner()


def call(*arguments: str) -> object:
    result = runner.invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_from_nothing_to_a_described_dataset(tmp_path: Path) -> None:
    toy, store = str(tmp_path / "toy"), str(tmp_path / "store")
    size = ["num_items=200", "num_users=300", "branching=[4,4]", "vector_dim=8"]
    written = call("synthesize", toy, *size)
    assert call("synthesize", toy, *size) == {"directory": toy, "interactions": None}
    assert call("validate", toy) == []
    (prepared,) = call("prepare", toy, "pairs.window=3", "--store", store)
    assert prepared["interactions"] == written["interactions"]
    found = call("describe", prepared["dataset"], "--store", store)
    assert found["counts"]["items"] == 200
    assert call("validate", prepared["dataset"], "--store", store) == []
    imported = call("import", toy, f"output={tmp_path / 'again'}")
    assert imported["rows"]["interactions"] == written["interactions"]


def test_bad_files_fail_validate_with_an_example(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\nu,a,-1\nu,a,x\n")
    result = runner.invoke(app, ["validate", str(tmp_path), "--json"])
    assert result.exit_code == 2
    causes = {finding["cause"]: finding["example"] for finding in json.loads(result.stdout)}
    assert set(causes) == {"negative_timestamp", "invalid_timestamp"}
    assert (
        "interactions.csv row 1: timestamp must be >= 0, got '-1'" in causes["negative_timestamp"]
    )
    with pytest.raises(DataError, match="row 2: timestamp must be a whole number"):
        runner.invoke(app, ["prepare", str(tmp_path)], catch_exceptions=False)


def test_al_gr_files_go_in_and_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [["user_history", "target_item"], *files.sequence_rows(rng, 5), ["a;;b", "c"]]
    raw = files.write_rows(tmp_path / "raw/s1.csv", rows)
    inside, out = str(tmp_path / "in"), str(tmp_path / "out")
    config = ["version=final", f"output={inside}"]
    report = call("import", str(raw.parent), "--format", "al-gr", *config)
    assert (report["rows"], report["skipped"]) == ({"sequences": 5}, {"empty_item": 1})
    assert call("export", inside, out)["left_out"] == {"empty_item": 1}
    lines = raw.read_text().splitlines()
    assert (tmp_path / "out/s1.csv").read_text().splitlines() == lines[:-1]
    with pytest.raises(ConfigError, match="overrides must go with a dataset"):
        runner.invoke(app, ["export", inside, out, "targets=last"], catch_exceptions=False)
