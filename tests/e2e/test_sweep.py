"""A real sweep, killed and continued: tokenizers, DeepSpeed training, evaluation, on tiny data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import Ledger, SweepRecords
from forge_ray.sweep.study import open_storage
from tests.tiny_sweep import with_sections

SWEEP = with_sections(
    """
space:
  sid.quantizer.codebook_size: {choice: [32, 64]}
  sid.resolver.kind: {choice: [bucket, extra_token]}
max_concurrent: 2
"""
)
RUN = (
    "from forge_ray.cli.console import setup_logging; setup_logging(verbose=False); "
    "from forge_ray.cli.sweep import app; app()"
)


def command(folder: Path, *arguments: str) -> list[str]:
    file = str(folder / "sweep.yaml")
    store = str(folder / "store")
    return [sys.executable, "-c", RUN, arguments[0], file, "--store", store, *arguments[1:]]


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        command(folder, *arguments), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ledger(folder: Path) -> Ledger:
    return Ledger(folder / "store" / "sweeps" / "tiny")


def make(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


def kill_during_training(folder: Path, *, finished: int) -> None:
    """Starts the sweep and kills its driver once so many trials are done and one trains."""
    driver = subprocess.Popen(
        command(folder, "run"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and driver.poll() is None:
        records = ledger(folder).read()
        training = [one for one in records.trials.values() if one.state == "running"]
        if len(records.finished()) >= finished and any(one.proxies for one in training):
            break
        time.sleep(0.2)
    assert driver.poll() is None, "the sweep ended before it could be killed"
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()


def tokenizers(folder: Path) -> dict[str, str]:
    manifests = ArtifactStore(folder / "store").manifests("quantizer")
    return {one.key: one.created for one in manifests}


def proxies(records: SweepRecords) -> dict[str, dict[str, Any]]:
    """SID metrics by trial key, without what differs by machine."""
    return {
        key: {name: value for name, value in one.proxies.items() if "seconds" not in name}
        for key, one in records.trials.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_sweep_continues_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, broken = make(tmp_path / "whole"), make(tmp_path / "broken")
    run(whole, "run")
    kill_during_training(broken, finished=2)
    before, ids = ledger(broken).read(), tokenizers(broken)
    assert any(one.state == "running" for one in before.trials.values())
    output = json.loads(run(broken, "run", "--json"))
    after = ledger(broken).read()

    # No finished trial repeats, no tokenizer retrains.
    for one in before.finished():
        assert len(after.trials[one.key].attempts) == 1
    assert {key: tokenizers(broken)[key] for key in ids} == ids
    # The same trials with the same SID metrics.
    assert proxies(after) == proxies(ledger(whole).read())
    assert all(one.is_finished for one in after.trials.values())
    # The control was stopped by the gate, the ranking stands, floors beside it.
    control = next(
        one for one in after.trials.values() if one.point == {"sid.quantizer.kind": "random"}
    )
    assert control.pruned_by == "gate"
    assert {row["kind"] for row in output["ranking"]} == {"trial", "floor"}
    assert Path(output["report"]).stat().st_size > 1_000_000
    # Optuna holds no zombie.
    folder = ledger(broken).folder
    storage = open_storage("", folder)
    states = [
        trial.state
        for name in optuna.get_all_study_names(storage)
        for trial in optuna.load_study(study_name=name, storage=storage).trials
    ]
    assert not {TrialState.RUNNING, TrialState.WAITING} & set(states)

    # One new value in the space trains only what is new.
    models = {one.key for one in ArtifactStore(broken / "store").manifests("model")}
    file = broken / "sweep.yaml"
    file.write_text(file.read_text().replace("choice: [32, 64]", "choice: [32, 64, 128]"))
    run(broken, "run")
    grown = ledger(broken).read()
    new = [one for key, one in grown.trials.items() if key not in after.trials]
    assert {one.point["sid.quantizer.codebook_size"] for one in new} == {128}
    assert all(
        len(grown.trials[key].attempts) == len(one.attempts) for key, one in after.trials.items()
    )
    assert models < {one.key for one in ArtifactStore(broken / "store").manifests("model")}

    # The test split is used once; a second call prints the stored figures.
    first = json.loads(run(broken, "finalize", "--json"))
    assert {row["model"] for row in first} >= {"popularity", "item_knn"}
    assert json.loads(run(broken, "finalize", "--json")) == first
    assert len(ledger(broken).read().finalized) == 1


@pytest.mark.parametrize("name", ["quickstart", "beauty"])
def test_shipped_sweeps_are_valid(name: str) -> None:
    from itertools import islice

    from forge_ray.sweep.plan import quasi_random_points
    from forge_ray.sweep.resolve import trial_config
    from forge_ray.sweep.space import parse_space

    root = Path(__file__).resolve().parents[2]
    config = load_config(SweepConfig, path=root / "sweeps" / f"{name}.yaml")
    assert config.num_trials is not None
    assert config.num_trials >= 8
    points = islice(quasi_random_points(parse_space(config.space), seed=0), 64)
    kinds = {trial_config(config, point).sid.quantizer.kind for point in [*config.points, *points]}
    assert kinds == {"random", "rq_kmeans", "rq_vae"}
