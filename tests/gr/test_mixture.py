"""Mixtures of tasks: what a step holds on any number of workers, and runs that go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.data import stream
from forge_ray.data.ragged import Ragged
from forge_ray.data.stream import Cursor
from forge_ray.gr.batches import micro_batches, with_scripts
from forge_ray.gr.checkpoint import Progress, RunIdentity, parse_manifest
from forge_ray.gr.config import GrConfig
from forge_ray.gr.loop import TrainJob
from forge_ray.gr.mixture import MixedBatch, Mixture, TextData
from forge_ray.gr.run_folder import RunFolder
from forge_ray.gr.scripts import ANSWER, TaskText
from forge_ray.gr.tasks import ITEM_TASK
from forge_ray.gr.validation import CheckpointValidator
from forge_ray.gr.vocab import vocab_of
from tests.gr.chains import grid_table
from tests.gr.models.checkpoints import qwen_checkpoint
from tests.gr.searches import titled_dataset, whole_titles
from tests.gr.test_loop import Outside, losses, rows, run

TASKS = ["tasks.search=1", "tasks.query_to_sid=0.5", "tasks.item_to_sid=0.5",
         "tasks.sid_to_text=0.25"]  # fmt: skip
TABLE = grid_table()


@pytest.fixture(scope="module", autouse=True)
def _without_ray() -> Iterator[None]:
    """Segments are read where they are used; the end-to-end test has Ray Data do it."""

    with pytest.MonkeyPatch.context() as patch:
        here = stream.SequenceStream._execute_here
        patch.setattr(stream.SequenceStream, "_execute", here)
        yield


class World:
    """A dataset with queries, a checkpoint, and jobs on them."""

    def __init__(self, folder: Path) -> None:
        self.store = ArtifactStore(folder / "store")
        self.dataset = titled_dataset(self.store)
        self.queries = whole_titles(self.store, self.dataset)
        self.checkpoint = qwen_checkpoint(folder / "qwen", is_tied=False)
        self._model: Any = None  # reading a checkpoint takes a second

    def config(self, *overrides: str) -> GrConfig:
        given = [
            "model.kind=pretrained_decoder",
            f"model.pretrained={self.checkpoint}",
            f"tasks.queries={self.queries.key}",
            "engine.global_batch=32",
            "engine.learning_rate=0.01",
            "engine.warmup_steps=5",
            "data.segment_files=2",
            "max_steps=60",
            "validation.every=20",
            "validation.users=60",
            "validation.ks=[10]",
            "validation.widths=[10,20]",
            *TASKS,
            *overrides,
        ]
        config = load_config(GrConfig, overrides=given)
        if self._model is None:
            self._model = config.model.resolved()
            self._text = self._model.task_text(config.tasks)
        return replace(config, model=replace(self._model, targets=config.model.targets))

    @property
    def data(self) -> TextData:
        return TextData(self._text, self.queries)

    def job(self, folder: Path, *overrides: str) -> TrainJob:
        config = self.config(*overrides)
        return TrainJob(
            config=config,
            dataset=self.dataset,
            codebook_sizes=TABLE.codebook_sizes,
            identity=RunIdentity("c", "t", self.dataset.key, 1, "fp32"),
            folder=RunFolder.open(str(folder), "run"),
            started=time.time(),
            text=self.data,
        )

    def batches(
        self, config: GrConfig, count: int, cursors: dict[str, Cursor] | None = None, *,
        rank: int = 0, world_size: int = 1,
    ) -> list[MixedBatch]:  # fmt: skip
        mixture = Mixture(
            config, self.dataset, self.data, num_levels=2, rank=rank, world_size=world_size
        )
        with mixture.batches(cursors or {}) as found:
            return list(islice(found, count))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def listed(scripts: Ragged) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in scripts]


def test_every_step_has_the_share_of_every_task(world):
    config = world.config()
    shares = config.shares
    assert shares == {
        "next_item": 10, "search": 10, "query_to_sid": 5, "item_to_sid": 5, "sid_to_text": 2,
    }  # fmt: skip
    for batch in world.batches(config, 10):
        assert len(batch.items.rows) == 10
        kinds = Counter(kind_of(row) for row in listed(batch.scripts))
        # A search after nothing looks like a query alone.
        searches = kinds["search"] + kinds["query_to_sid"]
        assert searches == 15
        assert kinds["search"] <= 10
        assert (kinds["item_to_sid"], kinds["sid_to_text"]) == (5, 2)


def kind_of(script: tuple[int, ...]) -> str:
    mark = script.index(ANSWER)
    question, answer = script[:mark], script[mark + 1 :]
    if answer[0] < 0:
        return "sid_to_text"
    if any(entry >= 0 for entry in question):
        return "search"
    return "item_to_sid" if bytes(-3 - e for e in question[1:3]).hex() == TEXT else "query_to_sid"


TEXT = ""


@pytest.fixture(scope="module", autouse=True)
def _template_of_items(world: World) -> None:
    world.config()
    start = world.data.text.templates["item"][1]
    globals()["TEXT"] = bytes(-3 - entry for entry in start[:2]).hex()


def test_an_epoch_of_a_task_reads_every_row_once(world):
    config = world.config()
    queries = sum(len(batch) for batch in world.queries.batches("train"))
    found: Counter[tuple[int, ...]] = Counter()
    for batch in world.batches(config, queries // 9 + 40):
        if batch.following["search"].epoch > 0:
            break
        found.update(row for row in listed(batch.scripts) if kind_of(row) == "search")
    text = world.data.text
    expected: Counter[tuple[int, ...]] = Counter()
    for batch in world.queries.batches("train"):
        scripts = text.searches(batch.items.tail(20), batch.queries, batch.targets.values)
        expected.update(row for row in listed(scripts) if kind_of(row) == "search")
    assert found == expected


def test_one_row_a_sequence_concerns_the_next_item_alone(world):
    """Rows of queries and of the catalogue have one answer anyway: they stay what they are."""
    every, last = (
        world.config("model.targets=last", f"data.targets={targets}") for targets in ("all", "last")
    )
    batches = world.batches(last, 80)
    epoch = [one for one in batches if one.following[ITEM_TASK].epoch == 0]
    assert len(epoch) < len(batches)
    found = sorted(row.tolist() for one in epoch for row in one.items.rows)
    users = [row for batch in world.dataset.sequence_batches("train") for row in batch.items]
    assert found == sorted(row[-21:].tolist() for row in users if len(row) > 1)
    assert [listed(one.scripts) for one in batches[:10]] == [
        listed(one.scripts) for one in world.batches(every, 10)
    ]


def test_workers_share_what_one_reads(world):
    config = world.config()
    whole = world.batches(config, 12)
    shares = [world.batches(config, 12, rank=rank, world_size=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        found = sorted(row for part in parts for row in listed(part.scripts))
        assert found == sorted(listed(batch.scripts))
        assert {part.script_targets for part in parts} == {batch.script_targets}
        assert all(part.following == batch.following for part in parts)


def test_a_cursor_goes_on_at_any_step(world):
    config = world.config()
    whole = world.batches(config, 20)
    for step in (1, 7, 15):
        rest = world.batches(config, 20 - step, whole[step - 1].following)
        assert [listed(one.scripts) for one in rest] == [
            listed(one.scripts) for one in whole[step:]
        ]
        assert all(
            one.items.rows == other.items.rows
            for one, other in zip(rest, whole[step:], strict=True)
        )


def test_targets_are_counted_as_they_are_charged(world):
    config = world.config()
    for batch in world.batches(config, 5):
        passes = micro_batches(batch.items.rows, TABLE.codes, 3, is_packed=True)
        passes = with_scripts(passes, batch.scripts, TABLE.codes, vocab_of(TABLE.codebook_sizes))
        assert len(passes) == 3
        assert sum(int(one.scripts.is_target.sum()) for one in passes) == batch.script_targets


def test_more_passes_than_rows_leave_some_empty():
    nothing = Ragged.from_lists([], dtype=np.int32)
    passes = micro_batches(nothing, TABLE.codes, 2, is_packed=False)
    passes = with_scripts(passes, nothing, TABLE.codes, vocab_of(TABLE.codebook_sizes))
    assert not any(one.scripts.is_target.any() for one in passes)


@pytest.fixture(scope="module")
def reference(
    world: World, process_group: None, tmp_path_factory: pytest.TempPathFactory
) -> TrainJob:
    """A run that nothing disturbs, which chooses weights by searches."""
    job = world.job(tmp_path_factory.mktemp("reference"), "tasks.validate=search")
    ending, _ = run(job)
    assert ending.kind == "finished"
    return job


def test_a_mixture_learns_to_search(reference):
    found = rows(reference)
    assert found[-1]["loss"] < found[1]["loss"] < found[0]["loss"]
    assert found[-1]["ItemHit@10"] > 0.3  # ten of 120 items: a twelfth by chance


@pytest.mark.usefixtures("process_group")
def test_a_stopped_mixture_comes_to_the_same_end(world, tmp_path, reference):
    job = world.job(tmp_path, "tasks.validate=search")
    for step in (10, 20, 40):
        ending, loop = run(job, Outside(["", "stop"] if step == 40 else ["stop"]))
        assert (ending.kind, loop._progress.step) == ("stopped", step)
        assert set(loop._progress.cursors) == set(job.config.tasks.text_tasks)
    run(job)
    assert losses(job) == losses(reference)
    assert rows(job) == rows(reference)


@pytest.mark.usefixtures("process_group")
def test_a_training_without_histories(world, tmp_path):
    few = ["max_steps=20", "validation.every=10"]
    job = world.job(tmp_path, "tasks.next_item=0", "tasks.validate=search", *few)
    _, loop = run(job)
    found = rows(job)
    assert found[-1]["loss"] < found[0]["loss"]
    assert loop._progress.cursor == Cursor()
    assert ITEM_TASK not in loop._progress.cursors


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("task", ["search", "query_to_sid"])
def test_validation_asks_as_training_does(world, tmp_path, monkeypatch, task):
    asked: list[Ragged] = []
    questions = TaskText.questions

    def watched(self: TaskText, histories: Ragged, queries: list[str]) -> Ragged:
        asked.append(histories)
        return questions(self, histories, queries)

    job = world.job(
        tmp_path, "tasks.next_item=0", "tasks.search=0", "tasks.query_to_sid=0", f"tasks.{task}=1",
        "tasks.validate=search", "max_steps=2", "validation.every=2",
    )  # fmt: skip
    trained = Ragged.concatenate([one.scripts for one in world.batches(job.config, 4)])
    has_history = {
        any(entry >= 0 for entry in row[: row.index(ANSWER)])
        for row in listed(trained)
        if kind_of(row) in ("search", "query_to_sid")
    }
    assert (True in has_history) == (task == "search")
    run(job)  # its rows are read in another way than batches of one process are
    monkeypatch.setattr(TaskText, "questions", watched)
    found = CheckpointValidator(job, TABLE.codes, device="cpu").run(2, best=1.0)
    assert found["users"] == 60
    assert (max(len(row) for one in asked for row in one) > 0) == (task == "search")


@pytest.mark.usefixtures("process_group")
def test_the_next_item_is_validated_unless_told(world, tmp_path):
    job = world.job(tmp_path, "max_steps=10", "validation.every=10")
    run(job)
    assert rows(job)[-1]["users"] == 60
    assert torch.isfinite(torch.tensor(losses(job))).all()


def test_manifests_from_before_there_were_mixtures_are_read():
    identity = RunIdentity("c", "t", "d", 1, "fp32")
    old = (
        '{"identity": {"config_hash": "c", "table_key": "t", "dataset_key": "d", "zero_stage": 1, '
        '"precision": "fp32"}, "progress": {"step": 3, "cursor": {"epoch": 0, "segment": 1, '
        '"batch": 2}, "tokens": 9, "history": [], "pending": null}, "world_size": 1, "files": {}}'
    )
    found = parse_manifest(old, "checkpoint.json", identity).progress
    assert found == Progress(3, Cursor(0, 1, 2), 9)
