"""The status table: 80 columns, a pipe, and a sweep that another process runs meanwhile."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from forge_ray.cli import sweep_status
from forge_ray.cli.sweep_status import StatusView
from forge_ray.sweep.config import BudgetConfig, SweepConfig
from forge_ray.sweep.ledger import Ledger, SweepLock
from forge_ray.sweep.prices import Prices
from tests.sweep.records import METRIC

CONFIG = SweepConfig(name="shown", space={"a": {"choice": [1]}})
POINT = {
    "sid.quantizer.kind": "rq_kmeans",
    "sid.quantizer.levels": 3,
    "sid.resolver.kind": "x" * 40,
}


def write(folder: Path, *, trials: int) -> Ledger:
    ledger = Ledger(folder)
    ledger.append("session", remaining=trials, dashboard="http://127.0.0.1:8265")
    for number in range(trials):
        key = f"{number:064x}"
        ledger.append("start", key=key, number=number, point=POINT, config={})
        scores = {"backoff_bits": 12.345, "uniqueness": 0.98765, "embedding_hitrate": 0.5}
        ledger.append("row", key=key, stage="proxy", metrics=scores, seconds={"fit": 4000.0})
        row = {"global_step": 123456, METRIC: 0.0512}
        ledger.append("row", key=key, stage="gr", metrics=row)
        if number:
            ledger.append("finish", key=key, state="complete", value=0.05 + number / 1e4)
    return ledger


def drawn(folder: Path, *, width: int, shows_all: bool = False) -> list[str]:
    view = StatusView(CONFIG, folder, shows_all=shows_all)
    console = Console(file=io.StringIO(), width=width)
    console.print(view.draw(view.look(), console))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    return text.splitlines()


def test_a_trial_is_one_line_in_eighty_columns(tmp_path: Path) -> None:
    write(tmp_path, trials=4)
    lines = drawn(tmp_path, width=80)
    rows = [line for line in lines if re.match(r"\s*\d+ (interrupted|complete) .* 1:06:40", line)]
    assert len(rows) == 4
    assert all(len(line) <= 80 for line in lines)
    first = rows[0].split()
    assert first[:3] == ["1", "interrupted", "train"]
    assert first[-7:] == ["12.35", ".988", ".500", "123456", ".0512", ".0512", "1:06:40"]
    assert "not running, 3 of 4 trials ended" in lines[0]
    assert any(line.startswith("best ItemNDCG@10 0.0503: trial 4, ") for line in lines)
    wide = "".join(drawn(tmp_path, width=120))
    assert "reason" in wide
    assert "12.35 .988 .500 123456 .0512 .0512" in re.sub(" +", " ", wide)


def test_the_budget_is_shown_where_one_is_set(tmp_path: Path) -> None:
    ledger = write(tmp_path, trials=2)
    assert not any("budget" in line for line in drawn(tmp_path, width=80))
    prices = Prices(cpu_hour=3.6)
    config = dataclasses.replace(CONFIG, budget=BudgetConfig(max_cost=10.0, prices=prices))
    row = {"global_step": 200000, METRIC: 0.06}
    held = {"cpus": {"fit": 2.0}, "gpus": {}}
    ledger.append("row", key=f"{0:064x}", stage="gr", metrics=row, **held)
    view = StatusView(config, tmp_path, shows_all=False)
    console = Console(file=io.StringIO(), width=100)
    console.print(view.draw(view.look(), console))
    # 4,000 s of two CPUs at a thousandth of a USD a second.
    assert re.search(r"^budget: 8 of 10 USD, .* h", console.file.getvalue(), re.M)  # type: ignore[attr-defined]
    found = view.as_json(view.look())["budget"]
    assert found["spent_usd"] == pytest.approx(8.0)


def test_thousands_of_trials_are_cut_unless_all_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path, trials=300)
    lines = drawn(tmp_path, width=80)
    assert len(lines) < 25
    assert re.match(r"\d+ more trials; --all shows them", lines[-1])
    assert len(drawn(tmp_path, width=80, shows_all=True)) > 300


WRITER = """
import sys, time
from pathlib import Path
from forge_ray.sweep.ledger import Ledger, SweepLock
folder = Path(sys.argv[1])
ledger = Ledger(folder)
with SweepLock(folder).held():
    ledger.append("session", remaining=1)
    ledger.append("start", key="k", number=0, point={"a": 1}, config={})
    print("started", flush=True)
    sys.stdin.readline()
    ledger.append("row", key="k", stage="proxy", metrics={"backoff_bits": 7.0})
    sys.stdin.readline()
    ledger.append("finish", key="k", state="complete", value=0.25)
"""


@pytest.fixture
def writer(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    yield process
    process.kill()
    process.wait()


def test_watching_follows_another_process_to_its_end(
    tmp_path: Path, writer: subprocess.Popen[str], monkeypatch, capsys
) -> None:
    seen = []

    def pause(_: float) -> None:
        assert writer.stdin is not None
        seen.append(view.look())
        if not seen[-1].is_running:
            return
        writer.stdin.write("\n")
        writer.stdin.flush()
        until = time.monotonic() + 60
        while view.look().trials == seen[-1].trials and SweepLock(tmp_path).is_held():
            assert time.monotonic() < until

    monkeypatch.setattr(sweep_status, "time", type("Clock", (), {"sleep": staticmethod(pause)}))
    view = StatusView(CONFIG, tmp_path, shows_all=False)
    last = sweep_status.watch(view, as_json=True)
    assert not last.is_running
    assert last.best == {"trial": 1, "design": "a=1", "value": 0.25, "error": None}
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["trials"][0]["stage"] == "tokenize"
    assert lines[0]["running"]
    assert lines[-1]["trials"][0]["state"] == "complete"
    assert not lines[-1]["running"]


def test_ctrl_c_ends_watching_and_not_the_sweep(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(f"name: shown\nfolder: {tmp_path}\nspace: {{a: {{choice: [1]}}}}\n")
    call = "from forge_ray.cli import main; main()"
    watcher = subprocess.Popen(
        [sys.executable, "-c", call, "sweep", "status", str(file), "--watch", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline())["running"]
    watcher.send_signal(signal.SIGINT)
    _, errors = watcher.communicate(timeout=120)
    assert watcher.returncode == 0
    assert "Traceback" not in errors
    assert SweepLock(tmp_path).is_held()
