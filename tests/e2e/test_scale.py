"""The scale run at a small size: every stage is measured, and a second run repeats none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "scale.py"
STAGES = {
    "synthesize",
    "index_and_order",
    "cut",
    "fit",
    "encode",
    "resolve",
    "score",
    "train",
    "recommend",
}


def run(folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), str(folder), "--sizes", "5000x20000,5000x60000"]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, text=True))
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_every_stage_is_measured_once(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert [set(size["stages"]) for size in found["sizes"]] == [STAGES, STAGES]
    large = found["sizes"][1]
    assert large["rows"]["items"] == 5000
    assert 40_000 < large["rows"]["interactions"] < 80_000
    asked = large["stages"]["recommend"]["rows"]
    assert 0.98 * asked < large["recommend"]["users"] < asked  # too few events: in no test split
    for name in ("synthesize", "index_and_order", "train", "recommend"):
        assert large["stages"][name]["driver_rss_mib"] > 50, name
        assert large["stages"][name]["largest_worker_own_mib"] > 20, name
    assert any(stage["object_store_mib"] > 0 for stage in large["stages"].values())
    assert {row["stage"] for row in found["growth"]} == STAGES
    assert found["growth"][0]["items_x"] == 1.0
    projected = {row["stage"]: row for row in found["projection"]["stages"]}
    assert projected["encode"]["times_more_work"] == 250e6 / 5000 * 64
    assert found["projection"]["usd"] > 0
    assert run(tmp_path) == found
