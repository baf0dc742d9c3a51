"""What a watcher sees: stages, elapsed time, the trials worth a line, and a ledger that grows."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest

from forge_ray.sweep.ledger import Ledger
from forge_ray.sweep.progress import elapsed_s, interesting, progress, stage_of
from forge_ray.sweep.tail import LedgerTail
from tests.sweep.records import METRIC, records, trial


def test_stages_follow_what_is_known() -> None:
    blank = {"proxies": {}, "history": [], "final": {}}
    assert stage_of(trial(0, state="running", **blank)) == "tokenize"
    assert stage_of(trial(0, state="running", history=[], final={})) == "train"
    row = {"global_step": 20, METRIC: 0.1}
    whole = {"config": {"gr": {"max_steps": 20}}, "final": {}}
    assert stage_of(trial(0, state="running", history=[row], **whole)) == "evaluate"
    assert stage_of(trial(0, state="pruned", pruned_by="asha", history=[row], **whole)) == "train"
    assert stage_of(trial(0, state="pruned", pruned_by="gate")) == "gate"
    assert stage_of(trial(0, value=0.2)) == "done"


def test_elapsed_time_is_that_of_the_sessions(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    spans = [("10:00:00", "10:00:30"), ("12:00:00", "12:00:10")]
    lines = []
    for first, last in spans:
        for event, at in (("session", first), ("floors", last)):
            fields = '"remaining": 3, "floors": {}'
            lines.append(f'{{"event": "{event}", "time": "2030-01-01T{at}+00:00", {fields}}}\n')
    ledger.path.parent.mkdir(exist_ok=True)
    ledger.path.write_text("".join(lines))
    found = ledger.read()
    assert found.sessions == 2
    assert elapsed_s(found, is_running=False) == 40
    later = datetime(2030, 1, 1, 12, 1, tzinfo=timezone.utc)
    assert elapsed_s(found, is_running=True, at=later) == 90


def test_of_many_trials_the_running_the_best_and_the_last_are_shown() -> None:
    many = [
        trial(n, value=0.001 * n, ended=f"2030-01-01T00:{n % 60:02d}:00+00:00")
        if n < 900
        else trial(n, state="running", value=0.001 * n)
        for n in range(902)
    ]
    rows = progress(records(*many), metric=METRIC, is_running=True).trials
    shown = [row["trial"] for row in interesting(rows, metric=METRIC)]
    assert {901, 902, 900, 899, 898, 897, 896} <= set(shown)
    assert len(shown) < 20
    assert shown == sorted(shown)
    assert len(interesting(rows[:20], metric=METRIC)) == 20


def test_a_tail_reads_what_was_added_and_waits_for_a_whole_line(tmp_path: Path) -> None:
    tail = LedgerTail(tmp_path / "none-yet")
    assert tail.poll() == set()
    ledger = Ledger(tmp_path)
    tail = LedgerTail(tmp_path)
    ledger.append("session", remaining=2)
    for number, key in enumerate("ab"):
        ledger.append("start", key=key, number=number, point={"a": number}, config={})
    assert tail.poll() == {"a", "b"}
    assert tail.poll() == set()
    ledger.append("row", key="b", stage="proxy", metrics={"backoff_bits": 1.5})
    with ledger.path.open("ab") as stream:
        stream.write(b'{"event": "finish", "key": "a"')
    assert tail.poll() == {"b"}
    assert tail.records.trials["b"].proxies == {"backoff_bits": 1.5}
    with ledger.path.open("ab") as stream:
        stream.write(b', "time": "t", "state": "complete", "value": 0.5}\n')
    assert tail.poll() == {"a"}
    assert tail.records.winner() is not None
    # A killed writer leaves half a line; the next one begins its own.
    with ledger.path.open("ab") as stream:
        stream.write(b'{"event": "fin')
    ledger.append("finish", key="b", state="complete", value=0.7)
    assert tail.poll() == {"b"}
    assert tail.records == ledger.read()
    ledger.path.unlink()
    ledger.append("session", remaining=1)
    tail.poll()
    assert not tail.records.trials


@pytest.mark.parametrize("is_running", [True, False])
def test_progress_counts_and_names_the_best(is_running: bool) -> None:
    found = progress(
        records(trial(0, value=0.2), trial(1, value=0.3), trial(2, state="running")),
        metric=METRIC,
        is_running=is_running,
    )
    assert found.best is not None
    assert (found.best["trial"], found.best["value"], found.best["error"]) == (2, 0.3, 0.001)
    assert found.trials[2]["state"] == ("running" if is_running else "interrupted")
    assert found.trials[1]["best"] == 0.3
