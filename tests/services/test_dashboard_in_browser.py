"""The dashboard as a person opens it: the links, and optuna-dashboard's view of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.test_dashboard import make_sweep, served
from tests.services.chromium import dom
from tests.sweep.records import METRIC

pytestmark = pytest.mark.services


def test_a_person_sees_links_and_the_study(tmp_path: Path) -> None:
    with served(make_sweep(tmp_path / "sweep")) as page:
        links = dom(page, tmp_path / "profile")
        assert f"Best {METRIC} 0.3000" in links
        assert "1 pruned before training" in links
        assert "Study: shop" in links
        study = dom(f"{page}/dashboard/studies/1", tmp_path / "profile")
        trials = dom(f"{page}/dashboard/studies/1/trials?numbers=1", tmp_path / "profile")
    assert "Best Trial (number=1)" in study
    assert ">0.3<" in study
    assert f">{METRIC}<" in study
    assert trials.count(">Pruned<") == 2
    assert "proxy:backoff_bits 9.0" in trials
