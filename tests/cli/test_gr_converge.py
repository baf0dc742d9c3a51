"""What `gr converge` prints, writes and refuses; the simulation itself is tested in tests/gr."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from forge_ray.cli.gr import app
from forge_ray.cli.gr_converge import _line, _write
from forge_ray.cli.gr_converge_figure import figure, places
from forge_ray.gr.converge import ConvergeConfig, convergence
from forge_ray.gr.convergence import Point


def curve(arm: str, values: list[float], *, offline: int = 0) -> list[Point]:
    """Points every 10 steps, the last ones online; the old model stands at 0.5."""
    return [
        Point(
            phase="offline" if number < offline else "online",
            stage=1,
            steps=10 * (number if number < offline else number - offline),
            tokens=number,
            value=value,
            reference=0.5,
        )
        for number, value in enumerate(values)
    ]


CURVES = {
    "cold": [curve("cold", [0.0, 0.2, 0.4])],
    "offline": [curve("offline", [0.0, 0.3, 0.3, 0.5, 0.6], offline=2)],
}


def test_offline_steps_stand_before_the_change() -> None:
    assert places(CURVES["offline"][0]) == [-10, 0, 0, 10, 20]
    assert places(CURVES["cold"][0]) == [0, 10, 20]
    drawn = figure({arm: curves[0] for arm, curves in CURVES.items()}, "HR@20")
    assert [trace.name for trace in drawn.data] == ["old model, old SIDs", "cold", "offline"]
    assert list(drawn.data[0].x) == [0, 10, 20]
    assert list(drawn.data[2].y) == [0.0, 0.3, 0.3, 0.5, 0.6]


def test_lines_and_files_hold_all_figures(tmp_path: Path) -> None:
    config = ConvergeConfig(arms=["cold", "offline"], seeds=[0])
    found = convergence(CURVES, config)
    lines = {arm: _line(arm, one) for arm, one in found.summaries.items()}
    assert lines["cold"]["reached after"] is None
    assert (lines["offline"]["reached after"], lines["offline"]["… with offline"]) == (10, 20)
    _write(tmp_path / "out", found, config)
    content = json.loads((tmp_path / "out" / "converge.json").read_text())
    assert content["curves"]["offline"][0][1]["value"] == 0.3
    assert content["summaries"]["offline"]["reached"]["steps"] == 10
    assert "old model, old SIDs" in (tmp_path / "out" / "converge.html").read_text()


def test_both_tables_must_be_named() -> None:
    done = CliRunner().invoke(app, ["converge", "shop-s1", "--old", "a"])
    assert done.exit_code == 2
    assert "--new" in done.output
