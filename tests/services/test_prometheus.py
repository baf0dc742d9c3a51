"""Debian's Prometheus scrapes a real sweep; panels and alerts are asked what they would show."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.gr.processes import wait_until
from tests.launch.monitoring import RULES, alerts, panels
from tests.services.prometheus import promtool, scraping
from tests.services.watched import WatchedSweep, open_ray, server_config

pytestmark = pytest.mark.services

# No GPU is here.
EMPTY = {"GPU"}


def peak(watched: WatchedSweep, expression: str) -> list[tuple[dict[str, str], float]]:
    """Largest value of each series while the sweep ran."""
    found = watched.prometheus.ask(
        "query_range",
        query=expression,
        start=str(watched.began),
        end=str(watched.ended + 30),
        step="1",
    )["result"]
    return [(one["metric"], max(float(value) for _, value in one["values"])) for one in found]


def test_every_panel_shows_the_sweep(watched: WatchedSweep) -> None:
    trials = watched.records.trials.values()
    assert {one.state for one in trials} == {"complete", "pruned"}, [one.reason for one in trials]
    empty = {title for title, expression in panels().items() if not peak(watched, expression)}
    assert empty == EMPTY


def test_every_alert_evaluates_and_none_fires(watched: WatchedSweep) -> None:
    for name, expression in alerts().items():
        assert watched.prometheus.query(expression) == [], name
    loaded = watched.prometheus.ask("rules")["groups"]
    states = {rule["name"]: rule["health"] for group in loaded for rule in group["rules"]}
    assert states == dict.fromkeys(alerts(), "ok")


def test_figures_are_those_of_the_ledger(watched: WatchedSweep) -> None:
    records = watched.records
    # Prometheus keeps no empty label.
    trials = {
        (tags["state"], tags.get("reason", "")): value
        for tags, value in peak(watched, panels()["Trials"])
    }
    assert trials["complete", ""] == 2
    assert trials["pruned", "limits"] == 1
    assert trials["failed", ""] == 0
    winner = records.winner()
    assert winner is not None
    assert [value for _, value in peak(watched, panels()["Best metric"])] == [
        pytest.approx(winner.value)
    ]
    trained = [one.history[-1]["train_tokens"] for one in records.trials.values() if one.history]
    counted = peak(watched, "sum(ray_forge_train_tokens_total{sweep='watched'})")
    assert len(trained) == 2
    assert [value for _, value in counted] == [sum(trained)]
    saved = peak(watched, "sum(ray_forge_checkpoints_total{sweep='watched'})")
    assert [value for _, value in saved] == [6]


def test_the_list_of_nodes_needs_the_token_and_their_metrics_do_not(watched: WatchedSweep) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{watched.dashboard}/api/prometheus/sd", timeout=30)
    # One port is the same for every Ray on a machine: that of another may be gone already.
    targets = watched.prometheus.ask("targets")["activeTargets"]
    healthy = [one for one in targets if one["health"] == "up"]
    assert healthy
    for one in healthy:
        with urllib.request.urlopen(one["scrapeUrl"], timeout=30) as page:
            assert b"# HELP" in page.read()


def test_gauges_end_with_the_sweep(watched: WatchedSweep) -> None:
    """The driver's process lives on here: only what is set again stays."""
    lasts = peak(watched, "timestamp(ray_forge_trials)")
    assert lasts
    assert max(value for _, value in lasts) < watched.ended + 30


def test_rules_are_sound_and_fire(tmp_path: Path) -> None:
    assert "4 rules found" in promtool("check", "rules", str(RULES))
    for path in (RULES, Path(__file__).with_name("alerts.yaml")):
        shutil.copy(path, tmp_path)
    assert "SUCCESS" in promtool("test", "rules", "alerts.yaml", cwd=tmp_path)


def test_a_ray_without_a_token_is_scraped_by_the_same_file_less_a_line(tmp_path: Path) -> None:
    lines = server_config("http://127.0.0.1:8265", tmp_path / "none").splitlines()
    open_config = "\n".join(one for one in lines if "authorization:" not in one)
    assert len(open_config.splitlines()) == len(lines) - 1
    with open_ray(tmp_path) as dashboard:
        config = open_config.replace("http://127.0.0.1:8265", dashboard)
        with scraping(config, tmp_path / "prometheus") as prometheus:
            wait_until(lambda: prometheus.query("up == 1"), "no node was scraped", 120)
            figure = '{__name__=~"ray_.+"}'
            wait_until(lambda: prometheus.query(figure), "no figure came", 120)
