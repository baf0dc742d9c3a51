"""The dashboard over HTTP: links, optuna-dashboard's interface, the report, and nothing written."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest

from forge_ray.errors import ConfigError
from forge_ray.launch.dashboard import (
    Dashboard,
    ShownSweep,
    make_dashboard_server,
    sweeps_in,
    tracker_links,
)
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import Ledger, SweepLock
from forge_ray.sweep.prices import Prices
from forge_ray.sweep.space import parse_space
from forge_ray.sweep.study import copy_finished, open_storage, study_name
from forge_ray.sweep.trackers.config import MlflowConfig, TrackersConfig, WandbConfig
from tests.sweep.records import METRIC, trial

SPACE = {"size": {"choice": [16, 32, 64, 128]}}


def make_sweep(folder: Path, name: str = "shop", *, storage: str = "") -> ShownSweep:
    """A sweep of four trials, as a driver leaves it: ledger and study."""
    config = SweepConfig(name=name, space=SPACE, storage=storage)
    ledger = Ledger(folder)
    ledger.append("session", remaining=4, dashboard="http://127.0.0.1:8265")
    trials = [
        trial(0, value=0.1),
        trial(1, value=0.3),
        trial(2, state="pruned", pruned_by="gate", reason="uniqueness 0.1 < 0.3", history=[]),
        trial(3, state="pruned", pruned_by="asha", reason="asha: rank 3 of 3", value=0.2),
    ]
    for one, size in zip(trials, (16, 32, 64, 128), strict=True):
        one.point = {"size": size}
        ledger.append("start", key=one.key, number=one.number, point=one.point, config=one.config)
        ledger.append("row", key=one.key, stage="proxy", metrics=one.proxies)
        for row in one.history:
            ledger.append("row", key=one.key, stage="gr", metrics=row)
        end = {"state": one.state, "value": one.value, "reason": one.reason}
        ledger.append("finish", key=one.key, pruned_by=one.pruned_by, **end)
    write_study(config, folder, trials)
    return ShownSweep(config=config, folder=folder)


def write_study(config: SweepConfig, folder: Path, trials: list[Any]) -> None:
    study = optuna.create_study(
        storage=open_storage(config.storage, folder),
        study_name=study_name(config.name, config.space),
        direction="maximize",
    )
    copy_finished(study, parse_space(config.space), trials, objectives=[METRIC], prices=Prices())


@contextmanager
def served(*sweeps: ShownSweep) -> Iterator[str]:
    """The address of a running dashboard."""
    with make_dashboard_server(Dashboard(sweeps), host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def fetch(url: str, **options: Any) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("storage", ["", "journal"])
def test_studies_show_proxies_curves_and_outcomes(tmp_path: Path, storage: str) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    url = str(folder / "optuna.journal") if storage else ""
    with served(make_sweep(folder, storage=url)) as page:
        found = json.loads(fetch(f"{page}/api/studies"))["study_summaries"]
        assert [one["study_name"] for one in found] == ["shop"]
        detail = json.loads(fetch(f"{page}/api/studies/{found[0]['study_id']}"))
    assert detail["objective_names"] == [METRIC]
    assert [one["state"] for one in detail["trials"]] == ["Complete"] * 2 + ["Pruned"] * 2
    assert [one["values"] for one in detail["best_trials"]] == [[0.3]]
    second = detail["trials"][1]
    attributes = {one["key"]: one["value"] for one in second["user_attrs"]}
    assert float(attributes["proxy:backoff_bits"]) == 9.0
    assert "proxy:embedding_hitrate" not in attributes
    assert [one["step"] for one in second["intermediate_values"]] == [10, 20]
    assert {one["name"]: one["param_external_value"] for one in second["params"]} == {"size": "32"}


def test_links_and_report_are_made_from_the_ledger(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "a")
    with served(sweep, make_sweep(tmp_path / "b", name="other")) as page:
        text = fetch(page)
        assert "not running, 4 of 4 trials ended" in text
        assert "1 pruned before training" in text
        assert f"Best {METRIC} 0.3000" in text
        assert 'href="/dashboard/studies/2"' in text
        assert 'href="/dashboard/studies/3"' in text
        assert "8265" not in text  # a Ray that ended with its sweep
        assert "<html" in fetch(f"{page}/dashboard/studies/2")
        report = fetch(f"{page}/report/0")
        assert "uniqueness 0.1 &lt; 0.3" in report
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(f"{page}/report/7")
        with SweepLock(sweep.folder).held():
            running = fetch(page)
        assert 'href="http://127.0.0.1:8265"' in running
    assert not (sweep.folder / "report.html").exists()


def test_a_ledger_links_nothing_but_pages(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    Ledger(sweep.folder).append("session", remaining=4, dashboard="javascript:alert(1)")
    with served(sweep) as page, SweepLock(sweep.folder).held():
        text = fetch(page)
    assert "<p>running, " in text
    assert "javascript:" not in text
    assert "Ray dashboard" not in text


def test_servers_are_linked_where_rays_variables_name_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_GRAFANA_HOST", "http://grafana:3000")
    monkeypatch.setenv("RAY_PROMETHEUS_HOST", "DISABLED")
    with served(make_sweep(tmp_path)) as page:
        text = fetch(page)
    assert '<a href="http://grafana:3000">Grafana</a>' in text
    assert "Prometheus" not in text


def test_a_browser_cannot_change_a_study(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    with served(sweep) as page:
        for method, path in (("DELETE", "/api/studies/1"), ("POST", "/api/studies")):
            with pytest.raises(urllib.error.HTTPError, match="405"):
                fetch(f"{page}{path}", method=method, data=b"{}")
        assert len(json.loads(fetch(f"{page}/api/studies"))["study_summaries"]) == 1
    view = Dashboard([sweep])._view
    with pytest.raises(PermissionError, match="only reads"):
        view.delete_study(1)


def test_earlier_spaces_and_other_peoples_studies(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    sweep = make_sweep(tmp_path / "a", storage=storage)
    earlier = SweepConfig(name="shop", space={"size": {"choice": [8]}}, storage=storage)
    write_study(earlier, tmp_path / "a", [])
    optuna.create_study(storage=open_storage(storage, tmp_path), study_name="theirs")
    with served(sweep) as page:
        found = json.loads(fetch(f"{page}/api/studies"))["study_summaries"]
    old = study_name("shop", earlier.space)[-8:]
    assert [one["study_name"] for one in found] == ["shop", f"shop (earlier space {old})"]


def test_a_sweep_that_never_ran_has_a_page(tmp_path: Path) -> None:
    new = ShownSweep(config=SweepConfig(name="new", space=SPACE), folder=tmp_path / "none")
    with served(new) as page:
        assert "No study yet" in fetch(page)
        assert json.loads(fetch(f"{page}/api/studies"))["study_summaries"] == []
        # It begins while the dashboard is up.
        make_sweep(tmp_path / "none", name="new")
        assert len(json.loads(fetch(f"{page}/api/studies"))["study_summaries"]) == 1
    assert not sweeps_in(tmp_path)


def test_reading_while_a_study_grows(tmp_path: Path) -> None:
    """A writer of the same SQLite file is not refused."""
    sweep = make_sweep(tmp_path)
    study = optuna.load_study(
        study_name=study_name("shop", SPACE), storage=open_storage("", tmp_path)
    )
    done = threading.Event()

    def write() -> None:
        for number in range(40):
            one = study.ask()
            one.suggest_categorical("size", SPACE["size"]["choice"])
            one.set_user_attr("proxy:backoff_bits", float(number))
            one.report(0.1, step=10)
            study.tell(one, 0.2 + number / 1000)
        done.set()

    writer = threading.Thread(target=write)
    with served(sweep) as page:
        writer.start()
        while not done.is_set():
            json.loads(fetch(f"{page}/api/studies/1"))
        writer.join()
        app = Dashboard([sweep])
        assert len(app._view.get_all_trials(1)) == 44


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    app = Dashboard([make_sweep(tmp_path)])
    with make_dashboard_server(app, host="127.0.0.1", port=0) as server:
        taken = server.server_port
        with pytest.raises(ConfigError, match=f"must be free to listen on, got 127.0.0.1:{taken}"):
            make_dashboard_server(app, host="127.0.0.1", port=taken)


def test_trackers_are_linked_or_their_command_is_shown(tmp_path: Path) -> None:
    config = SweepConfig(
        name="s",
        space=SPACE,
        trackers=TrackersConfig(
            mlflow=MlflowConfig(tracking_uri="http://tracking:5000"), wandb=WandbConfig()
        ),
    )
    links = tracker_links(config, tmp_path)
    assert links[0]["url"] == "http://tracking:5000"
    assert links[1]["command"] == f"wandb sync --append {tmp_path}/wandb/offline-run-*"
