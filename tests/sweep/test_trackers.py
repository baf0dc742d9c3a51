"""Trackers fed from a ledger: each library for real, read back with its own reader."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import Ledger
from forge_ray.sweep.trackers import feed as feeds
from forge_ray.sweep.trackers.clients import make_trackers
from forge_ray.sweep.trackers.config import (
    MlflowConfig,
    TensorboardConfig,
    TrackersConfig,
    WandbConfig,
    check_libraries,
)
from forge_ray.sweep.trackers.feed import TrackerFeed, feeding
from forge_ray.sweep.trackers.news import News, Sent, after, news_of
from tests.sweep.records import METRIC, trial

KEYS = ["a" * 64, "b" * 64]
POINT = {"sid.quantizer.kind": "rq_kmeans", "sid.quantizer.levels": 3}


def begin(ledger: Ledger, number: int) -> None:
    ledger.append("start", key=KEYS[number], number=number, point=POINT, config={})
    scores = {"backoff_bits": 11.5, "uniqueness": 0.9, "embedding_hitrate": None}
    found = {"sids": "sids/x-1", "scores": "scores/y-2"}
    ledger.append("row", key=KEYS[number], stage="proxy", metrics=scores, artifacts=found)


def step(ledger: Ledger, number: int, at: int) -> None:
    row = {"global_step": at, "loss": 1.0, METRIC: at / 100}
    ledger.append("row", key=KEYS[number], stage="gr", metrics=row)


def finish(ledger: Ledger) -> None:
    final = {METRIC: 0.25, "ItemHit@10": 0.5}
    ledger.append("row", key=KEYS[0], stage="final", metrics=final, artifacts={"model": "model/m"})
    ledger.append("finish", key=KEYS[0], state="complete", value=0.25)
    reason = "asha: rank 2 of 2"
    ledger.append("finish", key=KEYS[1], state="pruned", pruned_by="asha", reason=reason)


def track(config: TrackersConfig, folder: Path) -> None:
    with feeding(make_trackers(config, sweep="shop", folder=folder), folder):
        pass


def two_sessions(config: TrackersConfig, folder: Path) -> None:
    """The first ends while both trials train, the second continues them to their ends."""
    ledger = Ledger(folder)
    ledger.append("session", remaining=2)
    for number in (0, 1):
        begin(ledger, number)
        step(ledger, number, 10)
    track(config, folder)
    ledger.append("session", remaining=2)
    for number in (0, 1):
        ledger.append("start", key=KEYS[number], number=number, point=POINT, config={})
        step(ledger, number, 20)
    finish(ledger)
    track(config, folder)
    track(config, folder)  # nothing is left to send


def test_mlflow_holds_one_run_per_trial(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    two_sessions(TrackersConfig(mlflow=MlflowConfig()), tmp_path)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("shop")
    runs = client.search_runs([experiment.experiment_id], order_by=["attribute.start_time ASC"])
    assert len(runs) == 2
    first = next(run for run in runs if run.data.tags["trial_key"] == KEYS[0])
    second = next(run for run in runs if run is not first)
    assert first.data.params == {name: str(value) for name, value in POINT.items()}
    assert first.data.metrics["proxy/backoff_bits"] == 11.5
    assert first.data.metrics["final/ItemNDCG_at_10"] == 0.25
    assert "proxy/embedding_hitrate" not in first.data.metrics
    curve = client.get_metric_history(first.info.run_id, "ItemNDCG_at_10")
    assert [(one.step, one.value) for one in curve] == [(10, 0.1), (20, 0.2)]
    assert first.data.tags["artifact.sids"] == "sids/x-1"
    assert first.data.tags["artifact.model"] == "model/m"
    assert (first.info.status, second.info.status) == ("FINISHED", "KILLED")
    assert second.data.tags["reason"] == "asha: rank 2 of 2"
    # Found again by the key where the feed's own notes are lost.
    for path in (tmp_path / "trackers").iterdir():
        path.unlink()
    track(TrackersConfig(mlflow=MlflowConfig()), tmp_path)
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert len(client.get_metric_history(first.info.run_id, "ItemNDCG_at_10")) == 2


def events_of(folder: Path) -> list[Any]:
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.glob("events*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            event = event_pb2.Event()
            event.ParseFromString(content[place + 12 : place + 12 + size])
            found.append(event)
            place += 12 + size + 4
    return found


def test_tensorboard_files_hold_curves_proxies_and_parameters(tmp_path: Path) -> None:
    two_sessions(TrackersConfig(tensorboard=TensorboardConfig()), tmp_path)
    folder = tmp_path / "tensorboard" / f"000-{KEYS[0][:12]}"
    values = [(event.step, one) for event in events_of(folder) for one in event.summary.value]
    curve = [(at, round(one.simple_value, 6)) for at, one in values if one.tag == "ItemNDCG_at_10"]
    assert curve == [(10, 0.1), (20, 0.2)]
    tags = {one.tag for _, one in values}
    assert {"proxy/backoff_bits", "final/ItemHit_at_10", "trial/text_summary"} <= tags
    assert any(tag.startswith("_hparams_") for tag in tags)
    words = b"".join(one.tensor.string_val[0] for _, one in values if one.tensor.string_val)
    assert b"sids/x-1" in words
    assert KEYS[0].encode() in words


def test_wandb_works_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    two_sessions(TrackersConfig(wandb=WandbConfig()), tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    # Two trials in two sessions: the parts of a trial bear one id, which `wandb sync` joins.
    assert len(files) == 4
    assert len({path.name for path in files}) == 2
    config, summary, history = {}, {}, []
    for path in files:
        if KEYS[0][:16] not in path.name:
            continue
        for record in wandb_records(path):
            config |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
            config |= {one.key: json.loads(one.value_json) for one in record.config.update}
            summary |= {one.key: json.loads(one.value_json) for one in record.summary.update}
            row = {
                one.key or one.nested_key[0]: json.loads(one.value_json)
                for one in record.history.item
            }
            history += [(row["global_step"], row[METRIC])] if METRIC in row else []
    assert config["sid.quantizer.levels"] == 3
    assert config["trial_key"] == KEYS[0]
    assert history == [(10, 0.1), (20, 0.2)]
    assert summary["artifact.sids"] == "sids/x-1"
    assert summary["state"] == "complete"


def wandb_records(path: Path) -> list[Any]:
    """Records of a run's file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, found, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:  # the rest of a block is filled up
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


class Flaky:
    """A tracker that fails as long as it is down."""

    name, place = "flaky", "nowhere"

    def __init__(self) -> None:
        self.is_down = True
        self.heard: list[News] = []

    def send(self, news: News) -> str:
        if self.is_down:
            raise ConnectionError("server is down\nmore")
        self.heard.append(news)
        return "run-1"

    def close(self) -> None:
        if self.is_down:
            raise ConnectionError("still down")


def test_a_dead_tracker_is_told_once_and_hears_it_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr(feeds, "_RETRY_S", 0.0)
    ledger, flaky = Ledger(tmp_path), Flaky()
    begin(ledger, 0)
    with caplog.at_level(logging.INFO, logger="forge_ray"):
        feed = TrackerFeed(flaky, tmp_path)
        feed.start()
        for at in (10, 20, 30):
            step(ledger, 0, at)
            feed.wake()
        feed.close()
    assert not flaky.heard
    warnings = [one.getMessage() for one in caplog.records]
    assert sum("cannot write to nowhere: server is down." in one for one in warnings) == 1
    assert sum("1 trials have not arrived" in one for one in warnings) == 1
    flaky.is_down = False
    feed = TrackerFeed(flaky, tmp_path)
    feed.start()
    feed.close()
    assert [at for at, _ in flaky.heard[0].scalars] == [0, 10, 20, 30]
    assert len(flaky.heard) == 1


def test_a_ledger_that_cannot_be_read_for_a_moment_ends_no_tracker(
    tmp_path: Path, monkeypatch
) -> None:
    ledger, tracker = Ledger(tmp_path), Flaky()
    tracker.is_down = False
    begin(ledger, 0)
    feed = TrackerFeed(tracker, tmp_path)
    poll, failures = feed._tail.poll, [OSError(5, "Input/output error")]

    def away_at_first() -> set[str]:
        if failures:
            raise failures.pop()
        return poll()

    monkeypatch.setattr(feed._tail, "poll", away_at_first)
    feed.start()
    deadline = time.monotonic() + 30
    while not tracker.heard and time.monotonic() < deadline:
        feed.wake()
        time.sleep(0.01)
    feed.close()
    assert len(tracker.heard) == 1


def test_a_server_that_is_down_ends_nothing(tmp_path: Path, caplog, monkeypatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    begin(Ledger(tmp_path), 0)
    with caplog.at_level(logging.WARNING, logger="forge_ray"):
        track(TrackersConfig(mlflow=MlflowConfig(tracking_uri="http://127.0.0.1:9")), tmp_path)
    text = caplog.text
    assert text.count("cannot write to http://127.0.0.1:9, experiment shop") == 1
    assert "have not arrived" in text


def test_news_are_what_is_not_there_yet() -> None:
    record = trial(0, value=0.3)
    news = news_of(record, Sent())
    assert news is not None
    assert [at for at, _ in news.scalars] == [0, 10, 20, 20]
    assert news.is_ended
    sent = after(news, "r", Sent())
    assert sent == Sent(run="r", step=20, has_proxies=True, has_final=True, state="complete")
    assert news_of(record, sent) is None
    again = trial(0, state="running", value=0.3)
    reopened = news_of(again, sent)
    assert reopened is not None
    assert (reopened.run, reopened.scalars, reopened.is_ended) == ("r", [], False)


def test_the_sweep_file_chooses_trackers(tmp_path: Path, monkeypatch) -> None:
    base = ["name=s", "points=[{a: 1}]"]
    assert load_config(SweepConfig, overrides=base).trackers == TrackersConfig()
    given = load_config(SweepConfig, overrides=[*base, "trackers.tensorboard={}"]).trackers
    assert given == TrackersConfig(tensorboard=TensorboardConfig())
    with pytest.raises(ConfigError, match="must hold no password"):
        MlflowConfig(tracking_uri="https://me:secret@host/mlflow")
    with pytest.raises(ConfigError, match="offline, online"):
        WandbConfig(mode="shared")
    check_libraries(given)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'forge-ray\[wandb\]'"):
        check_libraries(TrackersConfig(wandb=WandbConfig()))
