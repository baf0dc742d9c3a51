from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import SweepRecords
from forge_ray.sweep.report import render_report, write_report
from forge_ray.sweep.views import cost_rows, counts, finalize_rows, ranking_rows, trial_rows
from tests.sweep.records import METRIC, records, trial

EVIL = "</script><img src=x onerror=alert(1)>"
CONFIG = SweepConfig(name="demo", space={"a": {"choice": [1, 2]}})
TRIALS = (
    trial(0, value=0.05),
    trial(1, value=0.02),
    trial(2, state="pruned", pruned_by="gate", reason="uniqueness 0.1 < 0.3", history=[]),
    trial(3, state="pruned", pruned_by="asha", reason="asha: 0.0100 < 0.0200 at step 10"),
    trial(4, state="failed", reason=f"boom {EVIL}", history=[]),
    trial(5, state="running", history=[], final={}),
)


class Text(HTMLParser):
    """Collects visible text and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data) -> None:
        if not self._hidden:
            self.text.append(data)


def read(found: SweepRecords, config: SweepConfig = CONFIG, *, is_running: bool = False) -> Text:
    page = Text()
    page.feed(render_report(found, config, is_running=is_running))
    return page


def test_ranking_holds_trials_and_floors_in_order() -> None:
    rows = ranking_rows(records(*TRIALS), metric=METRIC)
    assert [(row["rank"], row["kind"], row[METRIC]) for row in rows] == [
        (1, "trial", 0.05),
        (2, "floor", 0.04),
        (3, "trial", 0.02),
        (4, "floor", 0.01),
    ]


def test_states_and_reasons() -> None:
    found = records(*TRIALS)
    states = [row["state"] for row in trial_rows(found, metric=METRIC, is_running=False)]
    assert states == [
        "complete",
        "complete",
        "pruned before training",
        "pruned during training",
        "failed",
        "interrupted",
    ]
    assert counts(found)["pruned before training"] == 1
    assert trial_rows(found, metric=METRIC, is_running=True)[-1]["state"] == "running"


def test_costs_add_up() -> None:
    rows = {row["stage"]: row for row in cost_rows(records(*TRIALS[:2]))}
    assert rows["fit"]["seconds"] == 4.0
    assert rows["fit"]["CPU seconds"] == 2.0
    assert rows["train"]["trials"] == 2


def test_finalize_rows_rank_winner_and_floors() -> None:
    rows = finalize_rows(records(TRIALS[0], with_test=True).finalized[0], metric=METRIC)
    assert [row["model"] for row in rows] == ["item_knn", "winner (trial 1)", "popularity"]


def test_report_says_what_happened() -> None:
    page = read(records(*TRIALS, with_test=True))
    text = " ".join(" ".join(page.text).split())
    for part in (
        "uniqueness 0.1 < 0.3",
        "asha: 0.0100 < 0.0200",
        "popularity",
        "item_knn",
        "Test split",
        "interrupted",
        "Regret of the gate: not measured",
        "trial 1",
    ):
        assert part in text, part


def test_report_is_one_file_with_one_plotly() -> None:
    html = render_report(records(*TRIALS), CONFIG, is_running=False)
    tags = re.findall(r"<(?:script|link|img)\b[^>]*>", html[: html.index("<main>")])
    assert tags == ["<script>"]
    assert html.count("plotly.js v") == 1
    assert not re.findall(r'<(?:script|img|iframe)[^>]+src="http', html)


def test_data_cannot_become_markup() -> None:
    evil = trial(0, value=0.05, point={"x": EVIL}, reason=EVIL)
    pruned = trial(1, state="pruned", pruned_by="gate", reason=EVIL, point={"x": EVIL})
    config = SweepConfig(name="x", space={"a": {"choice": [EVIL]}}, data=EVIL)
    page = read(records(evil, pruned, with_test=True), config)
    assert "img" not in page.tags
    assert EVIL in "".join(page.text)


def test_report_of_nothing(tmp_path: Path) -> None:
    empty = SweepRecords(trials={}, finalized=[], floors={}, sessions=0)
    write_report(tmp_path / "deep" / "report.html", empty, CONFIG, is_running=False)
    text = (tmp_path / "deep" / "report.html").read_text()
    assert "No trial is complete yet." in text
    assert "No trial has started yet." in text


def test_report_of_trials_that_all_ended_early() -> None:
    page = read(records(*TRIALS[2:]), is_running=True)
    assert "while the sweep was running" in " ".join(page.text)


def test_stale_test_figure_is_marked() -> None:
    better = trial(7, value=0.9)
    page = read(records(TRIALS[0], better, with_test=True))
    assert "has changed since" in " ".join(page.text)
