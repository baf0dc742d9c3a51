"""The loop of one worker in this process: check-ups, validation points, every way to end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_ray.artifacts import ArtifactStore
from forge_ray.data import stream
from forge_ray.data.schema import Dataset
from forge_ray.gr import loop as loop_module
from forge_ray.gr import validation
from forge_ray.gr.checkpoint import WEIGHTS_FILE, RunIdentity
from forge_ray.gr.engine import Engine
from forge_ray.gr.health import VALIDATION_WARNING
from forge_ray.gr.loop import PREEMPTED, UNVALIDATED, Ending, LoopHooks, TrainJob, TrainLoop
from forge_ray.gr.meters import TRAIN_COUNTERS
from forge_ray.gr.run_folder import BEST, CHECKPOINTS, OUTCOME_FILE, RunFolder, checkpoint_name
from forge_ray.gr.validation import CheckpointValidator, InlineValidation
from tests.gr.chains import chain_dataset, grid_table, swinging_dataset
from tests.gr.test_train import small

pytestmark = pytest.mark.usefixtures("process_group")
TIMES = ("tokens_per_s", "input_wait_share", "startup_s", "users_per_s")


class LateValidation(InlineValidation):
    """Metrics that are never there before they are waited for."""

    def submit(self, step: int, best: float) -> None:
        self.asked = (step, best)

    def is_ready(self) -> bool:
        return False

    def result(self) -> dict[str, Any]:
        return self._validator.run(*self.asked)


@dataclass
class Outside:
    """What surrounds a loop: answers in turn, and what it was told."""

    asked: list[str] = field(default_factory=list)
    is_preempted: bool = False
    is_late: bool = False
    told: list[tuple[int, int]] = field(default_factory=list)  # step of the row, step it came at
    counted: list[dict[str, float]] = field(default_factory=list)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return chain_dataset(ArtifactStore(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module", autouse=True)
def _without_ray() -> Iterator[None]:
    """Segments are read where they are used; `test_train.py` has Ray Data do it."""

    with pytest.MonkeyPatch.context() as patch:
        here = stream.SequenceStream._execute_here
        patch.setattr(stream.SequenceStream, "_execute", here)
        yield


def make_job(dataset: Dataset, folder: Path, *overrides: str) -> TrainJob:
    table = grid_table()
    return TrainJob(
        config=small(*overrides),
        dataset=dataset,
        codebook_sizes=table.codebook_sizes,
        identity=RunIdentity("c", "t", dataset.key, 1, "fp32"),
        folder=RunFolder.open(str(folder), "run"),
        started=time.time(),
    )


def run(job: TrainJob, outside: Outside | None = None) -> tuple[Ending, TrainLoop]:
    """One attempt at a run, from its newest checkpoint."""
    outside = outside or Outside()
    codes = grid_table().codes
    validator = CheckpointValidator(job, codes, device="cpu")
    answers = iter(outside.asked)
    hooks = LoopHooks(
        report=lambda row: outside.told.append((row["global_step"], loop._progress.step)),
        validation=(LateValidation if outside.is_late else InlineValidation)(validator),
        poll=lambda: next(answers, ""),
        is_preempted=lambda: outside.is_preempted,
        count=outside.counted.append,
    )
    loop = TrainLoop(job, codes, hooks)
    loop.restore()
    return loop.run(), loop


def losses(job: TrainJob) -> list[float]:
    return job.folder.read_json(OUTCOME_FILE)["losses"]


def rows(job: TrainJob) -> list[dict[str, Any]]:
    """The rows of a run without what a clock measured."""
    found = job.folder.read_json("history.json")
    skip = ("validation_", *TIMES)
    return [{key: row[key] for key in row if not key.startswith(skip)} for row in found]


@pytest.fixture(scope="module")
def reference(
    dataset: Dataset, process_group: None, tmp_path_factory: pytest.TempPathFactory
) -> TrainJob:
    """A run that nothing disturbs, validated where it trains."""
    job = make_job(dataset, tmp_path_factory.mktemp("reference"))
    ending, _ = run(job)
    assert ending == Ending("finished")
    return job


def test_rows_are_taken_up_at_the_next_check_up(dataset, tmp_path):
    outside = Outside()
    run(make_job(dataset, tmp_path), outside)
    assert outside.told == [(20, 30), (40, 50), (60, 60)]


def test_tokens_waiting_and_checkpoints_are_counted(dataset, tmp_path):
    job, outside = make_job(dataset, tmp_path), Outside()
    run(job, outside)
    total = {
        name: sum(one.get(name, 0.0) for one in outside.counted)
        for name in {name for one in outside.counted for name in one}
    }
    assert set(total) == set(TRAIN_COUNTERS)
    assert total["forge_train_tokens"] == rows(job)[-1]["train_tokens"]
    assert total["forge_checkpoints"] == 3
    waited, took = total["forge_train_input_wait_seconds"], total["forge_train_seconds"]
    assert 0 < waited < took
    assert total["forge_checkpoint_seconds"] > 0


def test_late_metrics_are_waited_for_at_the_next_point(dataset, tmp_path, reference):
    job, outside = make_job(dataset, tmp_path), Outside(is_late=True)
    run(job, outside)
    assert outside.told == [(20, 40), (40, 60), (60, 60)]
    assert rows(job) == rows(reference)
    assert losses(job) == losses(reference)
    assert job.folder.names(BEST) == reference.folder.names(BEST)


def test_all_wait_where_rank_0_validates(dataset, tmp_path, monkeypatch):
    """Not in the next step, whose process group has a short patience; after a resume neither."""
    seen: list[str] = []

    def told(cls: type, name: str) -> None:
        before = getattr(cls, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return before(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, method)

    for cls, name in ((InlineValidation, "submit"), (Engine, "barrier"), (Engine, "step")):
        told(cls, name)
    job = make_job(dataset, tmp_path)
    run(job, Outside(["", "stop"]))
    run(job)
    after = [seen[at + 1] for at, name in enumerate(seen) if name == "submit"]
    assert after == ["barrier"] * 4


def test_the_configuration_says_whether_a_gpu_trains(dataset, tmp_path, monkeypatch):
    asked: list[bool] = []

    class Here(Engine):
        def __init__(self, *args: Any, use_gpu: bool, **kwargs: Any) -> None:
            asked.append(use_gpu)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(loop_module, "Engine", Here)
    for override in ("use_gpu=true", "in_process=true"):
        run(make_job(dataset, tmp_path / override, override, "max_steps=1"))
    assert asked == [True, False]


@pytest.mark.parametrize("is_late", [False, True])
def test_stopped_at_every_check_up_a_run_comes_to_the_same_end(
    dataset, tmp_path, reference, is_late
):
    job = make_job(dataset, tmp_path)
    for step in (10, 20, 30, 40, 50):
        ending, loop = run(job, Outside(["stop"], is_late=is_late))
        assert (ending.kind, loop._progress.step) == ("stopped", step)
        assert job.folder.names(CHECKPOINTS)[-1] == checkpoint_name(step)
    ending, _ = run(job, Outside(is_late=is_late))
    assert ending == Ending("finished")
    assert losses(job) == losses(reference)
    assert rows(job) == rows(reference)


def test_a_run_on_one_row_a_sequence_reads_each_once_an_epoch_and_goes_on(dataset, tmp_path):
    """600 sequences in two segments of ten batches: sixty steps are three epochs."""
    given = ["model.targets=last", "data.targets=last"]
    whole, cut = (make_job(dataset, tmp_path / name, *given) for name in ("whole", "cut"))
    run(whole)
    for step in (10, 20, 30):
        ending, loop = run(cut, Outside(["stop"]))
        assert (ending.kind, loop._progress.step) == ("stopped", step)
    run(cut)
    assert losses(cut) == losses(whole)
    assert rows(cut) == rows(whole)
    levels = len(whole.codebook_sizes)
    assert [row["train_tokens"] for row in rows(whole)] == [n * 600 * levels for n in (1, 2, 3)]


def test_a_finished_run_that_was_not_published_only_validates(dataset, tmp_path, reference):
    """The driver died between the last checkpoint and the model."""
    job = make_job(dataset, tmp_path)
    run(job)
    job.folder.delete(OUTCOME_FILE)
    outside = Outside()
    ending, _ = run(job, outside)
    assert ending == Ending("finished")
    assert outside.told == [(60, 60)]
    assert rows(job) == rows(reference)


def test_a_notice_of_preemption_saves_and_ends(dataset, tmp_path, reference):
    job = make_job(dataset, tmp_path, "validation.every=60")
    ending, loop = run(job, Outside(["", "look"], is_preempted=True))
    assert (ending.kind, loop._progress.step) == (PREEMPTED, 20)
    assert job.folder.names(CHECKPOINTS) == [checkpoint_name(20)]
    # Elsewhere.
    assert run(job)[0] == Ending("finished")
    assert losses(job) == losses(reference)


def test_a_notice_at_the_end_changes_nothing(dataset, tmp_path):
    job = make_job(dataset, tmp_path, "validation.every=60")
    ending, _ = run(job, Outside(["", "", "", "", "", "look"], is_preempted=True))
    assert ending == Ending("finished")


def test_a_look_without_a_notice_saves_nothing(dataset, tmp_path):
    job = make_job(dataset, tmp_path, "validation.every=60")
    run(job, Outside(["", "look"]))
    assert job.folder.names(CHECKPOINTS) == [checkpoint_name(60)]


def test_ruined_weights_are_not_saved(dataset, tmp_path, monkeypatch):
    """The loss of a step says nothing of the update that follows it."""
    job = make_job(dataset, tmp_path)
    run(job, Outside(["", "stop"]))
    ruined = {"weight": torch.tensor([1.0, float("inf")])}
    monkeypatch.setattr(Engine, "full_state", lambda self: ruined)
    ending, _ = run(job)
    assert ending == Ending("diverged", "weights that are not finite after step 40")
    assert job.folder.names(CHECKPOINTS) == [checkpoint_name(20)]


def damage(job: TrainJob, step: int, pattern: str) -> None:
    (path,) = Path(job.folder.path(CHECKPOINTS, checkpoint_name(step))).rglob(pattern)
    path.write_bytes(path.read_bytes()[:-1])


def test_a_run_whose_checkpoints_are_all_damaged_starts_afresh_and_keeps_what_it_saves(
    dataset, tmp_path, reference
):
    job = make_job(dataset, tmp_path, "validation.every=60")
    run(job, Outside(["", "", "stop"]))
    run(job, Outside(["stop"]))
    for step in (30, 40):
        damage(job, step, "*optim_states.pt")
    ending, loop = run(job, Outside(["stop"]))
    assert (ending.kind, loop._progress.step) == ("stopped", 10)
    assert job.folder.names(CHECKPOINTS) == [checkpoint_name(10)]
    assert "training starts afresh" in job.folder.read_json(OUTCOME_FILE)["warnings"][0]
    run(job)
    assert losses(job) == losses(reference)


def test_damaged_weights_that_wait_for_validation_cost_their_row_only(
    dataset, tmp_path, reference, caplog
):
    job = make_job(dataset, tmp_path)
    run(job, Outside(["", "", "stop"], is_late=True))
    damage(job, 20, WEIGHTS_FILE)
    ending, _ = run(job)
    assert ending == Ending("finished")
    assert "was not validated before its weights were damaged" in caplog.text
    assert [row["global_step"] for row in rows(job)] == [40, 60]
    assert losses(job) == losses(reference)


def test_a_failed_validation_costs_its_figures_only(dataset, tmp_path, reference, monkeypatch):
    job, outside = make_job(dataset, tmp_path), Outside()
    evaluate = validation.evaluate_generator
    answers = iter([torch.OutOfMemoryError("no room for 8 GiB\nand more"), None, None])

    def evaluate_or_not(*args: Any, **kwargs: Any) -> Any:
        error = next(answers)
        if error is not None:
            raise error
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(validation, "evaluate_generator", evaluate_or_not)
    assert run(job, outside)[0] == Ending("finished")
    first, *others = rows(job)
    assert first["ItemNDCG@10"] is None
    assert job.folder.read_json("history.json")[0]["validation_error"] == (
        "OutOfMemoryError: no room for 8 GiB"
    )
    assert first["loss"] == rows(reference)[0]["loss"]
    assert "ItemHit@10" not in first
    assert others == rows(reference)[1:]
    assert losses(job) == losses(reference)
    assert [step for step, _ in outside.told] == [40, 60]
    assert job.folder.read_json(OUTCOME_FILE)["warnings"] == [
        "step 20 has no validation figures: OutOfMemoryError: no room for 8 GiB"
    ]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_run_that_cannot_be_validated_ends_and_goes_on_once_it_can(
    dataset, tmp_path, reference, is_late
):
    """A file stands where the folder of best weights belongs, so they cannot be copied there."""
    job = make_job(dataset, tmp_path, "validation.every=10")
    job.folder.write(b"", BEST)
    ending, loop = run(job, Outside(is_late=is_late))
    assert ending.kind == UNVALIDATED
    assert "in 3 in a row" in ending.reason
    assert loop._progress.step == 40
    assert job.folder.names(CHECKPOINTS)[-1] == checkpoint_name(40)
    # It may fail as often again, or to the end.
    ending, loop = run(job, Outside(is_late=is_late))
    assert (ending.kind, loop._progress.step) == (UNVALIDATED, 60)
    assert "in the last validation" in ending.reason
    job.folder.delete(BEST)
    outside = Outside(is_late=is_late)
    assert run(job, outside)[0] == Ending("finished")
    assert outside.told == [(60, 60)]
    assert losses(job) == losses(reference)
    assert rows(job)[-1]["ItemNDCG@10"] == rows(reference)[-1]["ItemNDCG@10"]
    assert job.folder.names(BEST) == [f"{checkpoint_name(60)}.safetensors"]


def test_the_last_validation_is_tried_twice(dataset, tmp_path, reference, monkeypatch):
    job = make_job(dataset, tmp_path, "validation.every=60")
    evaluate, errors = validation.evaluate_generator, [OSError("disk")]

    def evaluate_late(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(validation, "evaluate_generator", evaluate_late)
    assert run(job)[0] == Ending("finished")
    (row,) = rows(job)
    assert row["ItemNDCG@10"] == rows(reference)[-1]["ItemNDCG@10"]
    (warning,) = job.folder.read_json(OUTCOME_FILE)["warnings"]
    assert warning == "step 60 has no validation figures: OSError: disk"


def test_figures_that_can_only_be_0_are_warned_of_once(tmp_path, caplog):
    """Users who swing between two items, validated three times."""
    swings = swinging_dataset(ArtifactStore(tmp_path / "data"))
    job = make_job(swings, tmp_path)
    run(job)
    assert [row["ItemNDCG@10"] for row in rows(job)] == [0.0, 0.0, 0.0]
    assert VALIDATION_WARNING not in job.folder.read_json("history.json")[0]
    (warning,) = job.folder.read_json(OUTCOME_FILE)["warnings"]
    assert "60 of them ask for an item of their history" in warning
    assert "set validation.exclude_seen=false" in warning
    assert caplog.text.count("kept out of the lists") == 1
    other = make_job(swings, tmp_path / "other", "validation.exclude_seen=false")
    run(other)
    assert rows(other)[-1]["ItemNDCG@10"] > 0.5
    assert losses(job) == losses(other)


RISING = [2.0] * 24 + [1000.0] * 36
"""Bad from step 25 on, so of the points at 10, 20 and so on two are good."""


def losses_of(steps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what the steps' losses are, whatever the model does."""
    monkeypatch.setattr(
        Engine, "step", lambda self, parts, *, num_targets, step: torch.tensor(steps[step - 1])
    )


def test_a_loss_that_leaves_rotates_no_good_checkpoint_out(dataset, tmp_path, monkeypatch):
    job = make_job(dataset, tmp_path, "validation.every=10", "stop.loss_steps=30")
    losses_of(RISING, monkeypatch)
    ending, _ = run(job, Outside(["", "", "", "", "stop"]))
    assert ending.kind == "stopped"
    assert job.folder.names(CHECKPOINTS) == [checkpoint_name(at) for at in (10, 20, 30, 40, 50)]
    ending, _ = run(job)
    assert ending.kind == "diverged"
    assert job.folder.names(CHECKPOINTS) == [checkpoint_name(10), checkpoint_name(20)]


def test_a_loss_that_comes_back_lets_old_checkpoints_go(dataset, tmp_path, monkeypatch):
    job = make_job(dataset, tmp_path, "validation.every=10")
    losses_of([2.0] * 24 + [100.0] * 2 + [0.0] * 34, monkeypatch)
    assert run(job)[0] == Ending("finished")
    assert job.folder.names(CHECKPOINTS) == [checkpoint_name(50), checkpoint_name(60)]


def test_patience_is_counted_over_interruptions(dataset, tmp_path):
    still = ["engine.learning_rate=1e-12", "stop.patience=1", "max_steps=200"]
    job = make_job(dataset, tmp_path, *still)
    first, _ = run(job, Outside(["", "", "stop"]))
    second, _ = run(job)
    assert (first.kind, second.kind) == ("stopped", "settled")
    assert [row["global_step"] for row in rows(job)] == [20, 40, 60]


def test_surpassed_weights_are_dropped(dataset, tmp_path, reference):
    """Of six validations, each better than the last, those that checkpoints may need stay."""
    job = make_job(dataset, tmp_path, "validation.every=10")
    figures = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])

    def run_rising(self: CheckpointValidator, step: int, best: float) -> dict[str, Any]:
        job.folder.write(b"x", BEST, f"{checkpoint_name(step)}.safetensors")
        return {"ItemNDCG@10": next(figures)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointValidator, "run", run_rising)
        run(job)
    assert job.folder.names(BEST) == [f"{checkpoint_name(n)}.safetensors" for n in (40, 50, 60)]
