"""The report as a person opens it: a real browser renders text and figures, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.report import write_report
from tests.services.chromium import rendered
from tests.sweep.records import records, trial

pytestmark = pytest.mark.services


def test_a_browser_draws_the_figures(tmp_path: Path) -> None:
    evil = "</script><script>document.title='broken'</script>"
    found = records(
        trial(0, value=0.05),
        trial(1, value=0.02),
        trial(2, state="pruned", pruned_by="gate", reason=f"uniqueness 0.1 < 0.3 {evil}"),
    )
    page = tmp_path / "report.html"
    config = SweepConfig(name="shown", space={"a": {"choice": [1, 2]}})
    write_report(page, found, config, is_running=False)
    dom = rendered(page, tmp_path / "profile")
    assert "shown" in dom
    assert "uniqueness 0.1 &lt; 0.3" in dom
    # plotly adds this class to every figure that it has drawn.
    assert dom.count("js-plotly-plot") >= 2
    assert "<title>broken" not in dom
