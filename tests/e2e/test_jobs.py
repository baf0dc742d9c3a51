"""A real sweep as a job of a real head with a token: sent, followed, stopped, continued."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.faults import TinySweep, rows_told, trains
from tests.e2e.head import TokenHead
from tests.gr.processes import wait_until

LONG = ("gr.max_steps=4000", "gr.validation.every=200")
"""Trainings that outlast the start of a few commands."""
pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def head() -> Iterator[TokenHead]:
    started = TokenHead.start()
    yield started
    started.stop()


def command(head: TokenHead, folder: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "forge_ray", "cluster", *words],
        cwd=folder,
        env={**head.environment, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(
    head: TokenHead, folder: Path, *words: str, code: int = 0, **env: str
) -> tuple[str, str]:
    """Standard output and error of a command that ends with this exit code."""
    words = (*words, "--address", head.address) if "--address" not in words else words
    called = command(head, folder, *words, **env)
    out, err = called.communicate(timeout=900)
    assert called.returncode == code, f"{out}\n{err}"
    return out, err


def test_a_stopped_job_is_continued_by_submitting_again(head: TokenHead, tmp_path: Path) -> None:
    sweep = TinySweep.make(tmp_path / "project")
    folder = sweep.folder
    submit = ["submit", "sweep.yaml", *LONG, "--store", str(folder / "store")]
    # The variable is one that `sweep run` itself gives to workers.
    submit += ["--driver-cpus", "0.5", "--env", "OMP_WAIT_POLICY=passive"]
    out, err = answer(head, folder, *submit)
    first = out.strip()
    assert first.startswith("tiny-")
    assert first.endswith("-1")
    assert "warning" not in err

    follower = command(head, folder, "logs", first, "-f", "--address", head.address)
    out, err = answer(head, folder, *submit)
    assert (out.strip(), "is running already" in err) == (first, True)
    assert "running with other settings" in answer(head, folder, *submit, "num_trials=3", code=2)[1]
    assert json.loads(answer(head, folder, "status", "tiny", "--json")[0])["id"] == first

    wait_until(lambda: half_way(head, sweep, first), "no second trial", 900)
    assert "STOPPED" in answer(head, folder, "stop", "sweep.yaml")[1]
    seen, told = follower.communicate(timeout=120)
    assert follower.returncode == 1, told
    assert "Running entrypoint for job" in seen
    assert "the same command continues" in seen  # it ended by itself: no kill
    before = finished(sweep)
    assert before
    begun = {key: told for key, told in rows_told(sweep).items() if key not in before}
    assert begun, "the training ended before the stop came"
    assert all(told[-1] > 0 for told in begun.values())

    seen, told = answer(head, folder, *submit, "--wait")
    assert f"submitted {first[:-1]}2" in told
    assert f"3 trials, {len(before)} finished" in seen
    after = finished(sweep)
    assert {key: after[key] for key in before} == before  # not repeated
    assert len(after) == 3
    trials = sweep.ledger.read().trials
    assert all(len(trials[key].attempts) == 1 for key in before)
    # A training that began anew would report its first step again.
    rows = rows_told(sweep)
    for told in rows.values():
        assert told == sorted(set(told))
    for key, told in begun.items():
        assert rows[key][: len(told)] == told
        assert rows[key][-1] > told[-1]

    out, err = answer(head, folder, *submit)
    assert (out.strip(), "has finished" in err) == (f"{first[:-1]}2", True)
    rows = json.loads(answer(head, folder, "list", "--json")[0])
    assert [row["status"] for row in rows] == ["STOPPED", "SUCCEEDED"]


def half_way(head: TokenHead, sweep: TinySweep, job: str) -> bool:
    """Whether a trial has finished and another trains; fails where the job has ended before."""
    # Not by session_latest: every process that joins makes that link anew.
    logs = next((head.folder / "ray").glob("session_2*")) / "logs"
    said = (logs / f"job-driver-{job}.log").read_text()
    assert "report:" not in said, said
    return bool(finished(sweep)) and trains(sweep.ledger.read())


def finished(sweep: TinySweep) -> dict[str, tuple[str, float | None]]:
    return {one.key: (one.state, one.value) for one in sweep.ledger.read().finished()}


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "must know the token, got one that it refuses"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "must be given a token, got none"),
    ],
)
def test_who_has_no_token_is_turned_away(head: TokenHead, tmp_path: Path, env, told) -> None:
    _, err = answer(head, tmp_path, "list", code=2, HOME=str(tmp_path), **env)
    assert err.startswith("error: ")
    assert told in err
    assert len(err.strip().splitlines()) == 1


def test_a_wrong_address_is_told(head: TokenHead, tmp_path: Path) -> None:
    words = ["list", "--address", "http://127.0.0.1:9"]
    _, err = answer(head, tmp_path, *words, code=2)
    assert "got no answer from http://127.0.0.1:9" in err
    assert len(err.strip().splitlines()) == 1


def test_a_job_that_is_not_there_is_told(head: TokenHead, tmp_path: Path) -> None:
    for name in ("status", "stop", "logs"):
        assert "must be a submission" in answer(head, tmp_path, name, "nobody", code=2)[1]
