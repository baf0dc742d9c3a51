from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_ray.errors import ConfigError
from forge_ray.sweep.ledger import Ledger, SweepLock, json_ready


def start(ledger: Ledger, key: str, number: int) -> None:
    ledger.append("start", key=key, number=number, point={"a": number}, config={"sid": {}})


def test_events_fold_into_records(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append("session", remaining=2)
    start(ledger, "k0", 0)
    ledger.append(
        "row",
        key="k0",
        stage="proxy",
        metrics={"backoff_bits": np.float32(12.5)},
        seconds={"fit": 3.0},
        gate="warm-up",
        would_prune=True,
        artifacts={"sids": "sids/a"},
    )
    for step in (10, 20):
        row = {"global_step": step, "loss": 1.0}
        ledger.append("row", key="k0", stage="gr", metrics=row, seconds={"fit": 3.0, "train": step})
    ledger.append("row", key="k0", stage="final", metrics={"ItemNDCG@10": 0.1})
    ledger.append("finish", key="k0", state="complete", value=0.1)
    record = ledger.read().trials["k0"]
    assert record.state == "complete"
    assert record.proxies == {"backoff_bits": 12.5}
    assert record.would_prune
    assert [row["global_step"] for row in record.history] == [10, 20]
    assert record.seconds == {"fit": 3.0, "train": 20}
    assert record.artifacts == {"sids": "sids/a"}
    assert record.is_finished
    ledger.write_trial(record)
    assert (tmp_path / "trials" / f"{record.name}.json").exists()


def test_a_followed_ledger_knows_what_it_appends(tmp_path: Path) -> None:
    start(Ledger(tmp_path), "k0", 0)
    ledger = Ledger(tmp_path)
    followed = ledger.follow()
    ledger.append("row", key="k0", stage="gr", metrics={"global_step": np.int64(3)})
    start(ledger, "k1", 1)
    ledger.append("finish", key="k1", state="pruned")
    assert followed.trials == ledger.read().trials
    assert followed.trials["k1"].state == "pruned"


def test_restart_adds_seconds_and_replaces_repeated_steps(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for first_step in (10, 20):
        start(ledger, "k0", 0)
        for step in (first_step, first_step + 10):
            row = {"global_step": step, "loss": float(first_step)}
            ledger.append("row", key="k0", stage="gr", metrics=row, seconds={"train": 5.0})
    record = ledger.read().trials["k0"]
    assert [(row["global_step"], row["loss"]) for row in record.history] == [
        (10, 10.0),
        (20, 20.0),
        (30, 20.0),
    ]
    assert record.seconds == {"train": 10.0}
    assert not record.is_finished


def test_what_an_earlier_start_worked_for_is_no_gift_of_the_store(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    scored = {"proxies": {"x": 1}, "cpus": {}, "gpus": {}}
    ledger.append("scored", key="k0", seconds={"fit": 60.0, "score": 2.0}, **scored)
    ledger.append("scored", key="k1", seconds={"fit": 0.1, "score": 2.0}, cached=["fit"], **scored)
    both = {"stage": "proxy", "metrics": {"x": 1}, "cached": ["fit", "score"]}
    for key in ("k0", "k1"):
        for number in range(2):
            start(ledger, key, number)
            ledger.append("row", key=key, seconds={"fit": 0.1, "score": 0.1}, **both)
    trials = ledger.read().trials
    assert (trials["k0"].cached, trials["k1"].cached) == ([], ["fit"])
    assert trials["k0"].seconds["fit"] == pytest.approx(60.2)
    # A model that an earlier start trained, which died before the last row.
    start(ledger, "k2", 2)
    ledger.append("row", key="k2", stage="gr", metrics={"global_step": 9}, seconds={"train": 5.0})
    start(ledger, "k2", 2)
    ledger.append("row", key="k2", stage="final", metrics={}, cached=["fit", "train"])
    assert ledger.read().trials["k2"].cached == ["fit"]


def test_cut_line_is_skipped_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    start(ledger, "k0", 0)
    with ledger.path.open("ab") as stream:
        stream.write(b'{"event": "finish", "key": "k0", "reason": "\xc3')  # half a character
    start(ledger, "k1", 1)
    ledger.append("error", key="k1", text="two\u2028lines\x85here")
    records = ledger.read()
    assert records.trials["k1"].reason == "two\u2028lines\x85here"
    assert list(records.trials) == ["k0", "k1"]
    assert records.trials["k0"].state == "running"


def test_winner_is_the_best_complete_trial(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.read().winner() is None
    for number, (state, value) in enumerate(
        [("complete", 0.1), ("pruned", None), ("complete", 0.3), ("complete", 0.3)]
    ):
        start(ledger, f"k{number}", number)
        ledger.append("finish", key=f"k{number}", state=state, value=value)
    winner = ledger.read().winner()
    assert winner is not None
    assert winner.number == 2


def test_lock_admits_one_driver(tmp_path: Path) -> None:
    lock = SweepLock(tmp_path)
    assert not lock.is_held()
    with lock.held():
        assert SweepLock(tmp_path).is_held()
        with (
            pytest.raises(ConfigError, match="driver that is running"),
            SweepLock(tmp_path).held(),
        ):
            pass
    assert not lock.is_held()


def test_a_look_at_the_lock_needs_no_right_to_write(tmp_path: Path, monkeypatch) -> None:
    plain = Path.open

    def read_only(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wa+"):
            raise PermissionError(30, "Read-only file system")
        return plain(path, mode, *args, **kwargs)

    lock = SweepLock(tmp_path)
    with lock.held():
        monkeypatch.setattr(Path, "open", read_only)
        assert SweepLock(tmp_path).is_held()
    assert not lock.is_held()
    assert not SweepLock(tmp_path / "nothing").is_held()


def test_a_look_at_the_lock_stops_no_driver(tmp_path: Path) -> None:
    lock = SweepLock(tmp_path)
    with lock.held():
        pass
    with lock.path.open("a+") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not lock.is_held()  # two who look
        timer = threading.Timer(0.25, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
        timer.start()
        with lock.held():
            assert lock.is_held()
        timer.join()


def test_values_become_json() -> None:
    value = {"a": np.int64(3), "b": [float("nan"), np.float32(0.5)], "c": np.bool_(True)}
    assert json_ready(value) == {"a": 3, "b": [None, 0.5], "c": True}
