"""A real sweep, killed and continued: tokenizers, DeepSpeed training, evaluation, on tiny data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.gate import GateState, decide, note_scores
from forge_ray.sweep.halving import AshaState, stop_reason
from forge_ray.sweep.ledger import Ledger, SweepRecords
from tests.e2e.faults import TinySweep, check_same, rows_told, training_rows, trains
from tests.tiny_sweep import with_sections

SWEEP = with_sections(
    """
space:
  sid.quantizer.codebook_size: {choice: [32, 64]}
  sid.resolver.kind: {choice: [bucket, extra_token]}
max_concurrent: 2
"""
)
# Both rules decide: half of the designs pass the gate, rungs at a third and two thirds of training
# stop those that learn nothing. With two trials at a time who is judged first is a matter of luck.
DECIDING = with_sections(
    """
space:
  sid.quantizer.codebook_size: {choice: [32, 48, 64]}
  sid.resolver.kind: {choice: [bucket, extra_token]}
  gr.engine.learning_rate: {choice: [3.0e-3, 1.0e-7]}
max_concurrent: 2
gate: {mode: quantile, warmup: 0, keep_quantile: 0.5, random_share: 0.0}
asha: {grace_steps: 20, reduction_factor: 2, min_earlier: 1}
"""
)
ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "sweeps").glob("*.yaml"))
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
        # A checkpoint lies behind whoever has reported a step.
        if len(records.finished()) >= finished and any(one.history for one in training):
            break
        time.sleep(0.2)
    assert driver.poll() is None, "the sweep ended before it could be killed"
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()


def tokenizers(folder: Path) -> dict[str, str]:
    manifests = ArtifactStore(folder / "store").manifests("quantizer")
    return {one.key: one.created for one in manifests}


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
    # The same trials with the same ends; no step is trained twice, Optuna holds no zombie.
    check_same(TinySweep(broken), TinySweep(whole))
    assert all(one.is_finished for one in after.trials.values())
    # The control was stopped by the gate, the ranking stands, floors beside it.
    control = next(
        one for one in after.trials.values() if one.point == {"sid.quantizer.kind": "random"}
    )
    assert control.pruned_by == "gate"
    assert {row["kind"] for row in output["ranking"]} == {"trial", "floor"}
    assert Path(output["report"]).stat().st_size > 1_000_000

    # One new value in the space trains only what is new.
    models = {one.key for one in ArtifactStore(broken / "store").manifests("model")}
    file = broken / "sweep.yaml"
    content = yaml.safe_load(file.read_text())
    content["space"]["sid.quantizer.codebook_size"]["choice"].append(128)
    file.write_text(yaml.safe_dump(content))
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gate_and_rungs_remember_what_a_killed_driver_knew(tmp_path: Path) -> None:
    """Whatever the order was: the decisions are those of one scheduler that saw every row."""
    sweep = TinySweep.make(tmp_path / "sweep", DECIDING)
    config = load_config(SweepConfig, path=sweep.folder / "sweep.yaml")
    driver = sweep.start()
    sweep.wait(driver, has_judged_a_rung_and_trains, "a rung behind one trial and one in training")
    before = sweep.ledger.read()
    driver.kill()
    driver.wait()
    sweep.finish(sweep.start())
    trials = sweep.ledger.read().trials
    assert all(one.is_finished for one in trials.values())
    for one in before.finished():
        assert len(trials[one.key].attempts) == 1

    # Halving: the rows of the ledger, judged again in their order, fill the same rungs.
    asha = AshaState()
    for key, row in training_rows(sweep):
        step, value = int(row["global_step"]), float(row[config.metric])
        rules = {"max_steps": config.gr["max_steps"], "config": config.asha}
        stop_reason(key, step, value, state=asha, **rules)
    kept = json.loads((sweep.ledger.folder / "scheduler.json").read_text(encoding="utf-8"))
    assert kept["asha"]["rungs"] == asha.rungs
    stopped = {key for key, one in trials.items() if one.pruned_by == "asha"}
    assert stopped == asha.stopped.keys()
    assert stopped
    for told in rows_told(sweep).values():
        assert told == sorted(set(told))

    # The gate: with all designs scored before anything trained, its answers depend on no order.
    gate = GateState()
    note_scores({key: one.proxies for key, one in trials.items()}, state=gate, config=config.gate)
    answers = {
        key: decide(key, one.proxies, state=gate, config=config.gate) for key, one in trials.items()
    }
    assert {key for key, one in trials.items() if one.pruned_by == "gate"} == {
        key for key, answer in answers.items() if not answer.go
    }
    assert {answer.rule for answer in answers.values()} == {"limit", "quantile", "passed"}


def has_judged_a_rung_and_trains(records: SweepRecords) -> bool:
    """Whether a trial has trained to its end, whatever that was, and another is under way."""
    return trains(records) and any(one.history for one in records.finished())


@pytest.mark.parametrize("name", [one.stem for one in SHIPPED])
def test_shipped_sweeps_are_valid(name: str, caplog: pytest.LogCaptureFixture) -> None:
    from itertools import islice

    from forge_ray.sweep.plan import quasi_random_points
    from forge_ray.sweep.resolve import check_rungs, trial_config
    from forge_ray.sweep.space import parse_space

    config = load_config(SweepConfig, path=ROOT / "sweeps" / f"{name}.yaml")
    check_rungs(config)
    assert not caplog.text
    drawn = islice(quasi_random_points(parse_space(config.space), seed=0), 12)
    points = [*config.points, *(drawn if config.space else ())]
    kinds = {trial_config(config, point).sid.quantizer.kind for point in points}
    assert kinds >= {"random", "rq_kmeans", "rq_vae"}
    assert config.num_trials is not None
    assert config.num_trials >= 8
    # Fixed points alone are what the evidence was recorded on: all of them run.
    assert config.space or config.num_trials == len(config.points)
