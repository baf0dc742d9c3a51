"""One real sweep in a browser: Ray's dashboard, optuna-dashboard's study, our page, the report."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest

from forge_ray.launch.dashboard import ShownSweep
from forge_ray.sweep.report import write_report
from tests.launch.test_dashboard import served
from tests.services.chromium import dom, screenshot
from tests.services.token_proxy import with_token
from tests.services.watched import WatchedSweep

pytestmark = pytest.mark.services


def test_rays_dashboard_shows_the_sweeps_job(watched: WatchedSweep, tmp_path: Path) -> None:
    with with_token(watched.dashboard, watched.token) as page:
        with urllib.request.urlopen(f"{page}/api/jobs/", timeout=60) as answer:
            (job,) = [one for one in json.load(answer) if one["type"] == "DRIVER"]
        url = f"{page}/#/jobs/{job['job_id']}"
        slow = "--virtual-time-budget=30000"
        text = dom(url, tmp_path / "profile", slow)
        picture = screenshot(url, tmp_path / "profile", "ray_job")
    assert job["job_id"] in text
    assert "RUNNING" in text
    assert picture.stat().st_size > 10_000


def test_our_page_the_study_and_the_report_say_the_same(
    watched: WatchedSweep, tmp_path: Path
) -> None:
    winner = watched.records.winner()
    assert winner is not None
    assert winner.value is not None
    shown = ShownSweep(config=watched.config, folder=watched.folder)
    with served(shown) as page:
        links = dom(page, tmp_path / "profile")
        number = re.search(r"/dashboard/studies/(\d+)", links)
        assert number is not None
        study = dom(f"{page}{number[0]}", tmp_path / "profile")
        trials = dom(f"{page}{number[0]}/trials?numbers=0", tmp_path / "profile")
        screenshot(page, tmp_path / "profile", "links")
        screenshot(f"{page}{number[0]}", tmp_path / "profile", "study")
    assert "3 of 3 trials ended" in links
    assert "1 pruned before training" in links
    best = f"{winner.value:.4f}"
    assert f"Best {watched.config.metric} {best}" in links
    assert "Best Trial (number=" in study
    assert str(winner.value)[:8] in study
    assert trials.count(">Pruned<") == 1
    assert trials.count(">Complete<") >= 2  # the opened trial says it once more


def test_the_report_of_that_sweep(watched: WatchedSweep, tmp_path: Path) -> None:
    winner = watched.records.winner()
    assert winner is not None
    path = tmp_path / "report.html"
    write_report(path, watched.records, watched.config, is_running=False)
    text = dom(path.as_uri(), tmp_path / "profile")
    screenshot(path.as_uri(), tmp_path / "profile", "report")
    assert f"{winner.value:.4f}" in text
    tiles = {
        label: value
        for value, label in re.findall(
            r'<div class="tile"><b>([^<]+)</b><span>([^<]+)</span></div>', text
        )
    }
    named = ("trials", "complete", "pruned before training")
    assert [tiles[label] for label in named] == ["3", "2", "1"]
    assert "failed" not in tiles
    assert "too few SIDs" in text or "hard limits" in text
    assert text.count("js-plotly-plot") >= 2
