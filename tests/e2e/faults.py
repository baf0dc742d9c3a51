"""A tiny real sweep as its own process: started, watched by its ledger, hurt, continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from forge_ray.artifacts import ArtifactStore
from forge_ray.sweep.ledger import Ledger, SweepRecords, TrialRecord
from forge_ray.sweep.study import open_storage
from tests.gr.processes import parent_of, wait_until
from tests.tiny_sweep import SWEEP

RUN = "import sys; sys.argv[0] = 'forge-ray'; from forge_ray.cli import main; main()"


_DRIVERS: list[subprocess.Popen[str]] = []


def end_drivers() -> None:
    """Kills the drivers that a failed test left; each takes the Ray that it started with it."""
    for driver in _DRIVERS:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
    _DRIVERS.clear()


@dataclass(frozen=True)
class TinySweep:
    """A sweep file with its store in a folder."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, text: str = SWEEP) -> TinySweep:
        """Writes the sweep file."""
        folder.mkdir(exist_ok=True)
        (folder / "sweep.yaml").write_text(text)
        return cls(folder)

    @property
    def ledger(self) -> Ledger:
        """The sweep's memory."""
        return Ledger(self.folder / "store" / "sweeps" / "tiny")

    def start(
        self, *overrides: str, store: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """The driver, in a session of its own; what it says goes to a file.

        Args:
            overrides: Words after the sweep file.
            store: URI; empty means a folder beside the sweep file.
            env: Its environment, for a sweep on a cluster; None is that of the test.
        """
        words = ["sweep", "run", str(self.folder / "sweep.yaml"), *overrides]
        uri = store or str(self.folder / "store")
        with self.said_by(len(_DRIVERS)).open("w") as said:
            driver = subprocess.Popen(
                [sys.executable, "-c", RUN, *words, "--store", uri],
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=env,
            )
        _DRIVERS.append(driver)
        return driver

    def finish(self, driver: subprocess.Popen[str], code: int = 0) -> str:
        """What the driver said, once it ended with this exit code."""
        driver.wait(timeout=900)
        output = self.said(driver)
        assert driver.returncode == code, output
        return output

    def said(self, driver: subprocess.Popen[str]) -> str:
        """What a driver has said so far."""
        return self.said_by(_DRIVERS.index(driver)).read_text(encoding="utf-8")

    def said_by(self, place: int) -> Path:
        """Where the driver that was started as that many-th of a test writes."""
        return self.folder / f"driver-{place}.log"

    def wait(
        self, driver: subprocess.Popen[str], reached: Callable[[SweepRecords], bool], what: str
    ) -> None:
        """Returns once the ledger says so; fails where the driver ended before."""

        def found() -> bool:
            assert driver.poll() is None, f"ended before {what}: {self.said(driver)}"
            return reached(self.ledger.read())

        wait_until(found, f"never reached: {what}", 900)

    def models(self) -> list[str]:
        """Keys of the models in the store."""
        return sorted(one.key for one in ArtifactStore(self.folder / "store").manifests("model"))

    def tokenizers(self) -> dict[str, str]:
        """Times of creation of the tokenizers by key."""
        found = ArtifactStore(self.folder / "store").manifests("quantizer")
        return {one.key: one.created for one in found}

    def optuna_states(self) -> list[TrialState]:
        """States of all Optuna trials of the sweep."""
        storage = open_storage("", self.ledger.folder)
        names = optuna.get_all_study_names(storage)
        studies = [optuna.load_study(study_name=name, storage=storage) for name in names]
        return [trial.state for study in studies for trial in study.trials]


def trains(records: SweepRecords) -> bool:
    """Whether a trial is in the middle of its training, a checkpoint behind it."""
    return any(one.state == "running" and one.history for one in records.trials.values())


def results(records: SweepRecords) -> dict[str, tuple[str, dict[str, Any]]]:
    """State and SID metrics of every trial by key, without what differs by run."""
    return {
        key: (one.state, {name: x for name, x in one.proxies.items() if "seconds" not in name})
        for key, one in records.trials.items()
    }


def training_rows(sweep: TinySweep) -> list[tuple[str, dict[str, Any]]]:
    """All rows that trainings measured, each with its trial's key, in their order.

    A model that is found in the store tells its rows again, with the seconds that were measured
    then; a training that began anew measures others.
    """
    events = map(json.loads, sweep.ledger.path.read_text(encoding="utf-8").splitlines())
    rows = {}
    for event in events:
        if event["event"] == "row" and event["stage"] == "gr":
            row = event["metrics"]
            measured = (row["global_step"], row["tokens_per_s"], row["validation_s"])
            rows.setdefault((event["key"], *measured), (event["key"], row))
    return list(rows.values())


def rows_told(sweep: TinySweep) -> dict[str, list[int]]:
    """Steps of all training rows ever reported, by trial key, in the order of the ledger."""
    told: dict[str, list[int]] = {}
    for key, metrics in training_rows(sweep):
        told.setdefault(key, []).append(int(metrics["global_step"]))
    return told


def check_trials(found: SweepRecords, whole: SweepRecords) -> None:
    """The same trials with the same ends after the same steps."""
    assert results(found) == results(whole)
    for key, one in found.trials.items():
        assert steps(one) == steps(whole.trials[key])


def check_same(sweep: TinySweep, undisturbed: TinySweep) -> None:
    """The same trials with the same ends; nothing is trained twice; no zombie."""
    check_trials(sweep.ledger.read(), undisturbed.ledger.read())
    # A training that began anew would report its first step again.
    for told in rows_told(sweep).values():
        assert told == sorted(set(told))
    assert sweep.models() == undisturbed.models()
    assert not {TrialState.RUNNING, TrialState.WAITING} & set(sweep.optuna_states())


def steps(record: TrialRecord) -> list[int]:
    """Steps of a trial's validations."""
    return [int(row["global_step"]) for row in record.history]


def below(driver: subprocess.Popen[str], name: str) -> list[int]:
    """Processes that the driver started, at any depth, whose command line holds a name."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if name in _command(pid) and _is_below(pid, driver.pid):
            found.append(pid)
    return found


def kill_one(driver: subprocess.Popen[str], name: str) -> None:
    """SIGKILL for one process of the driver's own."""
    pids = wait_until(lambda: below(driver, name), f"no process {name} of the driver", 60)
    os.kill(pids[0], signal.SIGKILL)


def _is_below(pid: int, ancestor: int) -> bool:
    while pid and pid != ancestor:
        pid = parent_of(pid)
    return pid == ancestor


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""  # it ended meanwhile
