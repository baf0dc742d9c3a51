"""The report as a person opens it: a real browser renders text and figures, without a network."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import pytest

from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.report import render_report, write_report
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


_MEASURE = """<script>
window.onerror = function (text) { document.body.dataset.error = text; };
addEventListener("load", function () {
  var frame = document.createElement("iframe");
  frame.style = "width:390px;height:800px;border:0";
  frame.onload = function () {
    setTimeout(function () {
      var page = frame.contentDocument.documentElement;
      document.body.dataset.width = page.clientWidth;
      document.body.dataset.scroll = page.scrollWidth;
      document.body.dataset.error = frame.contentWindow.failed || "none";
      document.body.dataset.ink = frame.contentDocument.querySelector(".xtick text").style.fill;
    }, 1500);
  };
  frame.srcdoc = document.getElementById("report").textContent;
  document.body.append(frame);
});
</script>"""
"""Lays the report out at the width of a phone: a window of a browser cannot be that narrow."""


@pytest.mark.parametrize(("scheme", "ink"), [("1", "rgb(29, 35, 39)"), ("0", "rgb(228, 231, 234)")])
def test_a_phone_scrolls_no_page_sideways_in_either_scheme(
    tmp_path: Path, scheme: str, ink: str
) -> None:
    design = {f"sid.quantizer.parameter_{place}": place for place in range(9)}
    found = records(
        trial(0, value=0.05, point={**design, "sid.quantizer.kind": "rq_vae"}),
        trial(1, value=0.02, point={**design, "sid.quantizer.kind": "rq_kmeans"}),
        trial(2, state="failed", reason="word " * 30 + "x" * 120, history=[]),
    )
    config = SweepConfig(name="a" * 60, space={"a": {"choice": [1, 2]}})
    html = render_report(found, config, is_running=False)
    watched = html.replace(
        "<head>", "<head><script>onerror = function (text) { window.failed = text; };</script>", 1
    )
    page = tmp_path / "phone.html"
    page.write_text(
        f'<body>{_MEASURE}<textarea id="report" hidden>{escape(watched)}</textarea></body>',
        encoding="utf-8",
    )
    flag = f"--blink-settings=preferredColorScheme={scheme}"
    dom = rendered(page, tmp_path / "profile", flag)
    data = dict(re.findall(r'data-(\w+)="([^"]*)"', dom[dom.rindex("<body") :][:400]))
    assert data["error"] == "none"
    # The frame is that wide, its scroll bar included.
    assert 0 < int(data["scroll"]) <= int(data["width"]) <= 390
    assert data["ink"] == ink
