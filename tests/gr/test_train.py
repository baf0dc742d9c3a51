"""Training under Ray: one worker, two workers, crashes, and the artifact that comes out.

Each training starts processes for seconds, so the tests share runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactInfo, ArtifactStore
from forge_ray.config import from_mapping, load_config
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError, StoppedError, TrainingError
from forge_ray.gr import train
from forge_ray.gr.checkpoint import load_generator, model_config
from forge_ray.gr.config import GrConfig, without_execution
from forge_ray.gr.run_folder import RunFolder, checkpoint_name
from forge_ray.gr.train import (
    TrainResult,
    _attempt_s,
    _check_outcome,
    _fit,
    _on_workers,
    _run_config,
    _waiting_for_resources,
    train_generator,
)
from tests.gr.chains import chain_dataset, grid_table
from tests.gr.processes import wait_until, worker_pids
from tests.gr.test_run_folder import IDENTITY, save, shard_path

SMALL = [
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.intermediate_size=32",
    "model.dropout=0",
    "engine.global_batch=32",
    "engine.learning_rate=0.01",
    "engine.warmup_steps=5",
    "data.segment_files=2",
    "max_steps=60",
    "validation.every=20",
    "validation.users=60",
    "validation.ks=[10]",
    "validation.widths=[10,20]",
]
"""60 steps are about three epochs of 38 batches over two segments."""


def small(*overrides: str) -> GrConfig:
    return load_config(GrConfig, overrides=[*SMALL, *overrides])


def run(folder: Path, name: str, *overrides: str, store: str = "store") -> TrainResult:
    where = ArtifactStore(folder / store)
    return train_generator(
        small(*overrides),
        chain_dataset(where),
        grid_table(),
        store=where,
        run_dir=str(folder / "runs"),
        name=name,
    )


def curve(result: TrainResult) -> list[float]:
    """Loss of every step."""
    return result.losses.tolist()


def quality(result: TrainResult) -> list[float]:
    """The figure of every validation."""
    return [row["ItemNDCG@10"] for row in result.history]


def checkpoints(folder: Path, name: str) -> list[str]:
    """Committed checkpoints of a run, oldest first."""
    found = (folder / "runs" / name / "checkpoints").glob("*/checkpoint.json")
    return sorted(path.parent.name for path in found)


@contextmanager
def asking_to_stop(folder: Path, name: str) -> Iterator[None]:
    """Somebody who keeps putting the stop file into the run's folder."""
    path, done = folder / "runs" / name / "stop", threading.Event()

    def keep_asking() -> None:
        while not done.wait(0.05):
            if path.parent.exists():
                path.touch()

    thread = threading.Thread(target=keep_asking)
    thread.start()
    yield
    done.set()
    thread.join()


def killed_run(folder: Path, name: str, *overrides: str, kills: int, seed: int) -> TrainResult:
    """A run whose workers are killed so often, each time some steps after a new checkpoint."""
    outcome: list[TrainResult] = []
    rng = np.random.default_rng(seed)
    thread = threading.Thread(
        target=lambda: outcome.append(run(folder, name, *overrides, store=f"store-{name}"))
    )
    thread.start()
    killed, seen = 0, 0
    while thread.is_alive() and killed < kills:
        found = checkpoints(folder, name)
        if found and int(found[-1][-8:]) > seen:
            time.sleep(rng.random() * 0.5)
            victims = worker_pids()
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            killed += bool(victims)
            seen = int(found[-1][-8:])
        time.sleep(0.02)
    thread.join(timeout=300)
    assert outcome, "the run did not finish"
    assert killed == kills
    return outcome[0]


def wait_for_step_20(folder: Path, name: str) -> None:
    path = folder / "runs" / name / "checkpoints" / "step_00000020" / "checkpoint.json"
    wait_until(path.exists, f"{path} did not appear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def reference(ray_local: None, folder: Path) -> TrainResult:
    """One worker, never interrupted."""
    return run(folder, "reference")


@pytest.mark.ray
class TestOneWorker:
    def test_it_learns_and_reports(self, reference):
        rows = reference.history
        assert [row["global_step"] for row in rows] == [20, 40, 60]
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert rows[-1]["stage"] == "gr"
        assert rows[-1]["ItemNDCG@10"] > 0.05  # a random list scores about 0.04
        assert reference.metrics["ItemNDCG@10"] == max(row["ItemNDCG@10"] for row in rows)
        assert 0 <= rows[-1]["input_wait_share"] <= 1
        assert rows[-1]["tokens_per_s"] > 0

    def test_worker_threads_equal_its_cpus(self, reference):
        """Oversubscribed threads were measured to slow a step 15 to 30 times."""
        assert {row["num_threads"] for row in reference.history} == {1}

    def test_the_model_loads_and_keeps_its_configuration(self, reference):
        generator = load_generator(reference.artifact, grid_table())
        tokens, mask = generator.vocab.history_tokens(
            Ragged.from_lists([[1, 2]], dtype=np.int64), grid_table().codes, 20
        )
        logits, _ = generator.prefill(tokens, mask)
        assert logits.shape == (1, 10)
        assert model_config(reference.artifact).identity() == small().identity()

    def test_the_same_content_is_not_trained_twice(self, reference, folder):
        began = time.monotonic()
        again = run(folder, "another-name", "cpus_per_worker=0.5", "max_failures=0")
        assert again.artifact.key == reference.artifact.key
        assert again.history == reference.history
        assert time.monotonic() - began < 5

    @pytest.mark.slow
    def test_what_cannot_be_validated_is_an_error_that_loses_no_step(self, reference, folder):
        """A file stands where the folder of best weights belongs."""
        blocked = folder / "runs" / "blind" / "best"
        blocked.parent.mkdir(parents=True)
        blocked.touch()
        with pytest.raises(TrainingError, match=r"must be validated, got .* the last validation"):
            run(folder, "blind", store="store-blind")
        assert checkpoints(folder, "blind")[-1] == "step_00000060"
        blocked.unlink()
        found = run(folder, "blind", store="store-blind")
        assert curve(found) == curve(reference)
        assert [row["global_step"] for row in found.history] == [60]

    def test_a_changed_configuration_under_the_same_name_is_refused(self, reference, folder):
        with pytest.raises(ConfigError, match=r"must belong to this configuration .*another name"):
            run(folder, "reference", "seed=1")


@pytest.mark.ray
class TestWorkers:
    def test_two_zero_1_workers_give_the_curve_of_one(self, reference, folder):
        """Same global batches, summed in another order."""
        two = run(
            folder, "two", "num_workers=2", "cpus_per_worker=0.5", "seed=0", store="store-two"
        )
        assert curve(two) == pytest.approx(curve(reference), rel=0.01)
        assert two.history[-1]["train_tokens"] == reference.history[-1]["train_tokens"]

    def test_a_killed_worker_resumes_to_the_same_curve(self, reference, folder):
        killed = killed_run(folder, "killed", kills=1, seed=0)
        assert curve(killed) == curve(reference)
        assert quality(killed) == quality(reference)


@pytest.mark.ray
class TestEndings:
    def test_a_stopped_run_continues_and_a_truncated_checkpoint_falls_back(
        self, reference, folder, caplog
    ):
        """Stopped at the first check-up of each attempt; then the newest shard loses its end."""
        name = "stopped"
        for step in (10, 20):
            with (
                asking_to_stop(folder, name),
                pytest.raises(StoppedError, match=f"request to stop at step {step}.*step_0+{step}"),
            ):
                run(folder, name, store="store-stopped")
        assert checkpoints(folder, name) == ["step_00000010", "step_00000020"]
        shard = next((folder / "runs" / name / "checkpoints/step_00000020/engine").glob("*optim*"))
        shard.write_bytes(shard.read_bytes()[:-100])
        result = run(folder, name, store="store-stopped")
        assert f"{shard} must have" in caplog.text
        assert "An older checkpoint is used" in caplog.text
        assert curve(result) == curve(reference)
        assert quality(result) == quality(reference)

    def test_patience_ends_a_run_that_no_longer_gains(self, ray_local, folder):
        """A learning rate of almost nothing: every validation gives the same figure."""
        result = run(
            folder, "settled", "engine.learning_rate=1e-12", "stop.patience=1", "max_steps=200",
            "validation.aside=false", store="store-settled",
        )  # fmt: skip
        # The second figure shows it; the third point is passed before that is known.
        assert [row["global_step"] for row in result.history] == [20, 40, 60]
        assert result.metrics["global_step"] == 20
        assert len(result.losses) == 60

    def test_divergence_names_the_last_good_checkpoint(self, ray_local, folder):
        """The learning rate climbs until the loss leaves."""
        with pytest.raises(TrainingError, match=r"keep a falling.*loss_factor=1\.2 times") as error:
            run(
                folder, "diverged", "engine.learning_rate=3", "engine.warmup_steps=60",
                "validation.every=5", "stop.loss_factor=1.2", "stop.loss_steps=2",
                store="store-diverged",
            )  # fmt: skip
        last = checkpoints(folder, "diverged")[-1]
        assert f"is intact: {folder}/runs/diverged/checkpoints/{last}" in str(error.value)
        assert "Lower engine.learning_rate" in str(error.value)


@pytest.mark.ray
@pytest.mark.slow
class TestSlow:
    @pytest.mark.parametrize("stage", [0, 2, 3])
    def test_two_workers_at_every_stage(self, reference, folder, stage):
        two = run(
            folder,
            f"stage-{stage}",
            "num_workers=2",
            "cpus_per_worker=0.5",
            f"engine.zero_stage={stage}",
            store=f"store-stage-{stage}",
        )
        assert curve(two) == pytest.approx(curve(reference), rel=0.01)

    @pytest.mark.parametrize("stage", [1, 3])
    def test_two_killed_workers_resume(self, reference, folder, stage):
        overrides = ["num_workers=2", "cpus_per_worker=0.5", f"engine.zero_stage={stage}"]
        killed = killed_run(folder, f"two-killed-{stage}", *overrides, kills=1, seed=stage)
        assert curve(killed) == pytest.approx(curve(reference), rel=0.01)

    @pytest.mark.timeout(3600)
    def test_ten_kills_change_nothing(self, ray_local, folder):
        longer = ["max_steps=360", "validation.every=30", "max_failures=10"]
        undisturbed = run(folder, "undisturbed", *longer, store="store-undisturbed")
        killed = killed_run(folder, "ten-kills", *longer, kills=10, seed=5)
        assert curve(killed) == curve(undisturbed)
        assert quality(killed) == quality(undisturbed)
        assert killed.metrics["ItemNDCG@10"] == undisturbed.metrics["ItemNDCG@10"]

    def test_t5_trains(self, ray_local, folder):
        result = run(folder, "t5", "model.kind=t5", store="store-t5")
        assert result.history[-1]["loss"] < result.history[0]["loss"]

    def test_a_loss_that_is_not_finite_is_a_training_error(self, ray_local, folder):
        with pytest.raises(TrainingError, match=r"finite loss, got .*none was written yet"):
            run(
                folder,
                "not-finite",
                "engine.learning_rate=1e30",
                "engine.clip_norm=0",
                store="store-not-finite",
            )

    def test_sigterm_saves_and_ends(self, folder):
        """What a scheduler sends before it takes the machine away."""
        script = (
            "from pathlib import Path\n"
            "from forge_ray.errors import StoppedError\n"
            "from forge_ray.launch.connect import connected\n"
            "from tests.gr.test_train import run\n"
            "with connected(address='local', num_cpus=2):\n"
            "    try:\n"
            f"        run(Path({str(folder)!r}), 'sigterm', 'max_steps=100000', store='store-s')\n"
            "    except StoppedError as error:\n"
            "        print(error)\n"
        )
        root = Path(__file__).resolve().parents[2]
        driver = subprocess.Popen(
            [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True
        )
        wait_for_step_20(folder, "sigterm")
        driver.terminate()
        said = driver.communicate(timeout=300)[0]
        assert driver.returncode == 0
        last = checkpoints(folder, "sigterm")[-1]
        assert f"a request to stop at step {int(last[-8:])}." in said
        assert f"continues it from {folder}/runs/sigterm/checkpoints/{last}" in said

    def test_a_killed_driver_resumes_with_the_same_command(self, reference, folder):
        """The whole Ray of the driver dies with it; the second call continues from step 20."""
        script = (
            "from pathlib import Path\n"
            "from forge_ray.launch.connect import connected\n"
            "from tests.gr.test_train import run\n"
            "with connected(address='local', num_cpus=2):\n"
            f"    result = run(Path({str(folder)!r}), 'driver', store='store-driver')\n"
            "    print(result.losses.tolist())\n"
        )
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", script]
        first = subprocess.Popen(command, cwd=root)
        wait_for_step_20(folder, "driver")
        first.kill()
        first.wait()
        second = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        losses = second.stdout.strip().splitlines()[-1]
        assert losses == str(curve(reference))


def test_config_rules():
    with pytest.raises(ConfigError, match=r"validation\.ks must contain 10"):
        load_config(GrConfig, overrides=["validation.ks=[5]"])
    for override, message in (
        ("cpus_per_worker=0", "cpus_per_worker must be > 0"),
        ("worker_resources={GPU: 1}", "worker_resources must be > 0 and not CPU or GPU"),
        ("seed=-1", r"seed must be in \[0"),
        ("validation.batch_users=0", r"validation\.batch_users must be >= 1"),
        ("engine.micro_batch=-1", r"engine\.micro_batch must be >= 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(GrConfig, overrides=[override])
    with pytest.raises(ConfigError, match="max_workers must be 0 or >= num_workers=3, got 2"):
        small("num_workers=3", "max_workers=2")
    with pytest.raises(ConfigError, match="keep_checkpoints must be >= 2, got 1"):
        small("keep_checkpoints=1")
    assert small("max_workers=4", "validation.aside=false").identity() == small().identity()


@pytest.mark.parametrize(
    "override",
    [
        "engine.micro_batch=8",
        "engine.activation_checkpointing=true",
        "engine.compile=true",
        "validation.batch_users=7",
        "validation.cpus=1",
        "validation.gpus=1",
    ],
)
def test_settings_of_memory_and_place_decide_no_model(override):
    assert small(override).identity() == small().identity()
    assert small("engine.global_batch=8").identity() != small().identity()


def test_an_ending_names_the_newest_checkpoint_that_is_whole(tmp_path):
    folder = RunFolder.open(str(tmp_path), "run")
    job: Any = SimpleNamespace(folder=folder, identity=IDENTITY)
    diverged = {"kind": "diverged", "reason": "a loss of nan at step 21", "step": 21}
    with pytest.raises(TrainingError, match="intact: none was written yet"):
        _check_outcome(diverged, job, name="run", command="")
    for step in (5, 10):
        save(folder, step)
    shard_path(tmp_path, 10).write_bytes(b"1")
    with folder.new_checkpoint(checkpoint_name(15)) as half:
        (half / "half").write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"intact: .*/checkpoints/step_00000005\."):
        _check_outcome(diverged, job, name="run", command="")


class TestAnswersOfSequences:
    """`data.targets`: a row for every item of a sequence, or for the last one only."""

    ONE_ANSWER = ["model.kind=t5"], ["model.targets=last"], ["model.kind=pretrained_t5"]

    @pytest.mark.parametrize("model", ONE_ANSWER)
    def test_models_of_one_answer_a_row_have_the_choice(self, model):
        assert load_config(GrConfig, overrides=model).plan.mode == "prefix"
        assert load_config(GrConfig, overrides=[*model, "data.targets=last"]).plan.mode == "last"

    @pytest.mark.parametrize(
        "kind", ["decoder", "rq_transformer", "parallel_heads", "pretrained_decoder"]
    )
    def test_models_that_learn_every_item_refuse_it(self, kind):
        config = load_config(GrConfig, overrides=[f"model.kind={kind}", "data.targets=last"])
        with pytest.raises(ConfigError, match=rf"data\.targets must be all for model\.kind={kind}"):
            config.check_targets()

    def test_keys_of_runs_from_before_stay(self):
        assert "targets" not in small("model.kind=t5").identity()["data"]
        given = {"data": {"targets": "all", "window_batches": 8}}
        assert without_execution(given) == {"data": {"window_batches": 8}}
        changed = load_config(GrConfig, overrides=["model.kind=t5", "data.targets=last"]).identity()
        assert changed["data"]["targets"] == "last"


@pytest.mark.parametrize(("use_gpu", "backend"), [(False, "gloo"), (True, "nccl")])
def test_workers_wait_for_a_long_validation(tmp_path, monkeypatch, use_gpu, backend):
    """Torch would end a wait after half an hour."""
    asked: list[Any] = []

    class Trainer:
        def __init__(self, worker: Any, **given: Any) -> None:
            asked.append(given["torch_config"])

        def fit(self) -> None:
            pass

    monkeypatch.setattr("forge_ray.trainer.ForgeTrainer", Trainer)
    monkeypatch.setattr("ray.put", lambda codes: codes)
    config = small(f"use_gpu={use_gpu}")
    run_config = _run_config(config, run_dir=str(tmp_path), name="run")
    job: Any = SimpleNamespace(config=config)
    _on_workers(grid_table(), run_config, ())(job)
    assert [(one.backend, one.timeout_s) for one in asked] == [(backend, 86_400)]


@pytest.mark.parametrize(
    ("overrides", "doubts"),
    [
        (["use_gpu=true"], True),
        (["use_gpu=true", "validation.gpus=1"], False),
        (["use_gpu=true", "validation.aside=false"], False),
        ([], False),
    ],
)
def test_decoding_on_a_cpu_beside_gpus_is_warned_of(overrides, doubts):
    found = small(*overrides).doubts()
    assert ["decodes on a CPU" in one for one in found] == [True] * doubts


def test_doubts_are_told_before_training_begins(store, tmp_path, monkeypatch, caplog):
    ending = {"kind": "finished", "warnings": []}
    monkeypatch.setattr(train, "_on_workers", lambda *args: None)
    monkeypatch.setattr(train, "_attempt", lambda *args: ending)
    monkeypatch.setattr(train, "_publish", lambda *args: ArtifactInfo())
    monkeypatch.setattr(train, "train_result", lambda artifact: artifact)
    for _ in range(2):  # the second time there is nothing to train
        train_generator(
            small("use_gpu=true"), chain_dataset(store), grid_table(),
            store=store, run_dir=str(tmp_path), name="run",
        )  # fmt: skip
    assert caplog.text.count("decodes on a CPU") == 1


def test_a_history_longer_than_the_places_is_refused_before_any_work(store, tmp_path):
    """Models that were trained so are still read: their configuration keeps no such rule."""
    config = load_config(
        GrConfig, overrides=["model.kind=rq_transformer", "model.places=20", "max_history=20"]
    )
    assert from_mapping(GrConfig, config.identity()) == config
    with pytest.raises(ConfigError, match=r"model\.places must be > max_history=20"):
        train_generator(
            config, chain_dataset(store), grid_table(),
            store=store, run_dir=str(tmp_path / "runs"), name="run",
        )  # fmt: skip
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("in_process", [False, True])
def test_what_this_process_warned_of_is_not_told_again(tmp_path, monkeypatch, caplog, in_process):
    """Workers warn where nobody looks, so the driver repeats what they wrote down."""
    folder = RunFolder.open(str(tmp_path), "run")
    config = small(f"in_process={in_process}")
    job: Any = SimpleNamespace(folder=folder, identity=IDENTITY, config=config)

    def start(job: Any) -> None:
        folder.write_json({"kind": "finished", "warnings": ["odd figures"]}, "outcome.json")

    for name in ("_here", "_on_workers"):
        monkeypatch.setattr(train, name, lambda *args: start)
    _fit(job, grid_table(), run_dir=str(tmp_path), name="run", callbacks=())
    assert ("odd figures" in caplog.text) is not in_process


@pytest.mark.parametrize("widths", ["[0,20]", "[20,9]"])
def test_widths_that_no_search_takes_are_refused_before_training(widths):
    with pytest.raises(ConfigError, match=r"validation\.widths must be >= 1 and end .*ks\)=10"):
        small(f"validation.widths={widths}").check_levels(2)
    small("validation.widths=[1,10]").check_levels(2)


def test_an_elastic_run_counts_its_nodes_again_soon(monkeypatch):
    """Ray counts a node for up to 20 seconds after it has gone, and then waits for it."""
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    monkeypatch.delenv(name, raising=False)
    for config, seconds, attempts in ((small("max_workers=2"), 30, 120), (small(), 900, 4)):
        with _waiting_for_resources(_attempt_s(config)):
            assert os.environ[name] == str(seconds)
        assert name not in os.environ
        run_config = _run_config(config, run_dir="runs", name="run")
        assert run_config.failure_config.controller_failure_limit == attempts
    monkeypatch.setenv(name, "5")
    with _waiting_for_resources(30):
        assert os.environ[name] == "5"
    assert os.environ[name] == "5"
