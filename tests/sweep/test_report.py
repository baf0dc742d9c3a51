from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from forge_ray.secrets import masked
from forge_ray.sweep.audit import audit
from forge_ray.sweep.budget import budget_state
from forge_ray.sweep.charts.space import parallel_coordinates
from forge_ray.sweep.config import BudgetConfig, SweepConfig
from forge_ray.sweep.importance import importances
from forge_ray.sweep.ledger import ScoredDesign, SweepRecords, fold
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.prices import Prices
from forge_ray.sweep.report import render_report, write_report
from forge_ray.sweep.spending import Unit, reuse, timeline, unit_of, waterfall
from forge_ray.sweep.views import cost_rows, counts, finalize_rows, ranking_rows, trial_rows
from tests.sweep.records import METRIC, records, trial

EVIL = "</script><img src=x onerror=alert(1)>"
CONFIG = SweepConfig(name="demo", space={"a": {"choice": [1, 2]}})
NO_LIMITS = GateConfig(min_uniqueness=None, min_usage=None, min_gain=None)
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


def test_waterfall_says_who_ended_where_and_what_it_used() -> None:
    limit = trial(
        6,
        state="pruned",
        pruned_by="gate",
        proxies={"infeasible": "few"},
        attempts=[{}],
        history=[],
    )
    found = replace(records(*TRIALS, limit), planned=9)
    unit = Unit(name="CPU seconds", prices=Prices())
    rows = waterfall(found, NO_LIMITS, unit)
    assert [(row.step, row.ended, row.left) for row in rows] == [
        ("not started yet", 2, 7),
        ("too few SIDs", 1, 6),
        ("proxy gate", 1, 5),
        ("halving at step 20", 1, 4),
        ("failed", 1, 3),
        ("unfinished", 1, 2),
    ]
    # A complete trial used 2 * 0.5 + 30 * 1 CPU seconds, the infeasible one nothing.
    assert (rows[1].used, rows[1].spared) == (0.0, 31.0)
    assert rows[0].spared is None


def test_designs_that_were_scored_and_never_began_count_everywhere() -> None:
    hour = "2030-01-01T{:02d}:00:00+00:00"
    first = trial(0, value=0.05, started=hour.format(1), ended=hour.format(2))
    cut = trial(1, state="running", attempts=[{"fit": 4.0}], started=hour.format(1))
    costs = {"seconds": {"fit": 6.0}, "cpus": {"fit": 2.0}, "gpus": {}, "proxies": {}}
    scored = {one: ScoredDesign(key=one, time=hour.format(0), **costs) for one in (first.key, "x")}
    found = replace(
        records(first, cut), scored=scored, planned=2, spans=[(hour.format(0), hour.format(2))]
    )
    prices = Prices(cpu_hour=3600.0)
    used = timeline(found, Unit(name="USD", prices=prices))
    spent = budget_state(found, BudgetConfig(prices=prices)).spent_usd
    # 31 and 2 of the trials, 12 of the other; what was scored of a trial is its own.
    assert (used.total, spent) == (45.0, 45.0)
    assert used.by_stage["fit"][1] == 12.0
    rows = {row.step: row for row in waterfall(found, NO_LIMITS, Unit(name="USD", prices=prices))}
    assert (rows["not started yet"].ended, rows["not started yet"].used) == (0, 12.0)
    fit = next(row for row in cost_rows(found) if row["stage"] == "fit")
    assert fit["CPU seconds"] == 15.0
    audited = audit([first, cut], metric=METRIC, unstarted=found.unstarted()).compute
    assert next(one for one in audited if one.stage == "fit").spent == 15.0


def test_limits_and_gate_are_told_apart() -> None:
    found = records(TRIALS[0], TRIALS[2])
    unit = Unit(name="CPU seconds", prices=Prices())
    gate = replace(NO_LIMITS, min_uniqueness=0.95)
    assert [row.step for row in waterfall(found, gate, unit)] == ["hard limits"]


def test_use_over_time_leaves_pauses_out() -> None:
    hour = "2030-01-01T{:02d}:00:00+00:00"
    first = trial(0, value=0.05, started=hour.format(0), ended=hour.format(1))
    second = trial(1, value=0.04, started=hour.format(11), ended=hour.format(12))
    spans = [(hour.format(0), hour.format(2)), (hour.format(10), hour.format(12))]
    found = replace(records(first, second), spans=spans)
    used = timeline(found, Unit(name="CPU seconds", prices=Prices()))
    assert used.hours == [0.0, 0.0, 1.0, 3.0, 4.0]
    assert used.by_stage["fit"] == [0.0, 1.0, 1.0, 2.0, 2.0]
    assert used.by_stage["train"][-1] == 60.0
    prices = Prices(cluster_hour=2.0)
    money = timeline(found, unit_of([first], prices))
    assert money.by_stage["cluster"][-1] == 8.0


def test_unit_is_money_then_gpus_then_cpus() -> None:
    gpu = trial(0, gpus={"train": 1.0})
    assert unit_of([gpu], Prices(cpu_hour=1.0)).name == "USD"
    assert unit_of([gpu], Prices()).name == "GPU seconds"
    assert unit_of([trial(1)], Prices()).name == "CPU seconds"


def test_reuse_counts_what_sharing_saved() -> None:
    dear, cheap = {"fit": 20.0}, {"fit": 0.5}
    shared = [
        trial(0, artifacts={"quantizer": "a", "sids": "x"}, attempts=[dear]),
        trial(1, artifacts={"quantizer": "a", "sids": "y"}, attempts=[cheap]),
        trial(2, artifacts={"quantizer": "b", "sids": "y"}, attempts=[dear]),
    ]
    quantizer, table = reuse(shared)
    assert (quantizer.num_distinct, quantizer.num_shared, quantizer.most) == (2, 1, 2)
    assert quantizer.saved_s == 19.5
    assert (table.num_distinct, table.saved_s) == (2, None)


def test_importance_finds_the_parameter_that_matters_also_under_a_condition() -> None:
    trials = []
    for number in range(24):
        point = {"kind": "ab"[number % 2], "noise": number // 2 % 2}
        if number % 2:
            point["lr"] = float(number)
        trials.append(trial(number, value=0.01 + 0.02 * (number % 2), point=point))
    found = {one.name: one for one in importances(trials)}
    assert found["kind"].share == 1.0
    assert found["noise"].share < 0.1
    assert (found["lr"].num_trials, found["lr"].num_groups) == (12, 3)


def test_parallel_coordinates_give_a_missing_parameter_its_own_tick() -> None:
    with_lr = trial(0, value=0.05, point={"kind": "vae", "lr": 0.1})
    chart = str(
        parallel_coordinates([with_lr, trial(1, value=0.1, point={"kind": "k"})], metric=METRIC)
    )
    assert "(none)" in chart
    assert parallel_coordinates([with_lr], metric=METRIC) is None


def test_trials_within_an_error_of_the_best_are_marked() -> None:
    rows = ranking_rows(
        records(trial(0, value=0.05), trial(1, value=0.0495), trial(2, value=0.04)), metric=METRIC
    )
    assert {row["trial"]: row["is_tied"] for row in rows if row["trial"]} == {
        1: True,
        2: True,
        3: False,
    }


def test_no_password_reaches_the_page() -> None:
    url = "postgresql://me:hunter2@db/optuna"
    assert masked(url) == "postgresql://me:***@db/optuna"
    assert masked("http://h/p?sslpassword=hunter2&a=1") == "http://h/p?sslpassword=***&a=1"
    found = replace(
        records(*TRIALS),
        command=("forge-ray", "sweep", "run", "a b.yaml", f"storage={url}"),
        environment={"ray": "9.9", "cluster": {"CPU": 4.0}},
    )
    config = SweepConfig(name="demo", space={"a": {"choice": [1, 2]}}, storage=url)
    html = render_report(found, config, is_running=False)
    assert "hunter2" not in html
    text = " ".join(read(found, config).text)
    assert "forge-ray sweep run 'a b.yaml' 'storage=postgresql://me:***@db/optuna'" in text
    assert "9.9" in text


def test_session_keeps_environment_and_command() -> None:
    event = {"event": "session", "time": "t", "environment": {"ray": "1"}, "command": ["a", "b"]}
    found = fold([event])
    assert (found.environment, found.command) == ({"ray": "1"}, ("a", "b"))


def test_many_trials_are_capped_and_the_page_says_so() -> None:
    many = [trial(number, value=0.01 + number * 1e-5) for number in range(400)]
    page = read(records(*many))
    text = " ".join(" ".join(page.text).split())
    assert "Drawn: 200 of 400" in text
    assert "The first 300 of 400" in text
    assert page.tags.count("tr") < 1000


def test_rungs_are_those_of_a_whole_training_while_nobody_has_come_so_far() -> None:
    """Stopped at the second of two rungs of 30 steps; step 20 is the last that anyone has seen."""
    html = render_report(
        records(trial(3, state="pruned", pruned_by="asha")), CONFIG, is_running=True
    )
    assert "stopped at rung 2 (step 20)" in html


def test_a_scatter_says_what_its_correlation_is_over() -> None:
    stopped = [trial(9 + i, state="pruned", pruned_by="asha") for i in range(3)]
    complete = [trial(i, value=0.01 * (i + 1)) for i in range(4)]
    early = " ".join(read(records(*stopped)).text)
    assert "over 3 trained trials at step 10 (none is complete)" in early
    assert "complete trials" not in early
    final = " ".join(read(records(*complete, *stopped)).text)
    assert "over 4 complete trials" in final
    assert "stopped by halving stand at their last value and are not in it" in final
    assert "are not in it" not in " ".join(read(records(*complete)).text)


def test_every_figure_has_words() -> None:
    html = render_report(records(*TRIALS), CONFIG, is_running=False)
    assert html.count('role="img"') == html.count("<figcaption>") >= 6
    assert not re.findall(r'aria-label=""', html)


def test_an_end_at_the_budget_says_what_comes_next() -> None:
    assert "Stopped at the budget" not in " ".join(read(records(*TRIALS)).text)
    ahead = [{"trial": 7, "design": "levels=4", "seconds": 61.2, "cost_usd": None}]
    stopped = {"reason": "1.9 of 2 USD are spent", "next": ahead, "left": 3}
    page = " ".join(read(replace(records(*TRIALS), stopped=stopped)).text)
    assert "Stopped at the budget: 1.9 of 2 USD are spent. 3 trials" in page
    assert re.search(r"7\s+levels=4\s+61\s+–", page)
