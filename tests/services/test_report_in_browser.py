"""The report as a person opens it: a real browser renders text and figures, without a network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.report import write_report
from tests.sweep.records import records, trial

pytestmark = pytest.mark.services

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--virtual-time-budget=8000",
    # Nothing may be fetched: the file is all there is.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


@pytest.fixture
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("chromium not found; install it (apt-get install chromium)")
    return found


def rendered(browser: str, page: Path, profile: Path) -> str:
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_a_browser_draws_the_figures(browser: str, tmp_path: Path) -> None:
    evil = "</script><script>document.title='broken'</script>"
    found = records(
        trial(0, value=0.05),
        trial(1, value=0.02),
        trial(2, state="pruned", pruned_by="gate", reason=f"uniqueness 0.1 < 0.3 {evil}"),
    )
    page = tmp_path / "report.html"
    config = SweepConfig(name="shown", space={"a": {"choice": [1, 2]}})
    write_report(page, found, config, is_running=False)
    dom = rendered(browser, page, tmp_path / "profile")
    assert "shown" in dom
    assert "uniqueness 0.1 &lt; 0.3" in dom
    # plotly adds this class to every figure that it has drawn.
    assert dom.count("js-plotly-plot") >= 2
    assert "<title>broken" not in dom
