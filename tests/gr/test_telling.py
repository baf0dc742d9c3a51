"""Who watches a training hears of every row once, whoever died meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray.train import UserCallback

from forge_ray.data.stream import Cursor
from forge_ray.gr.checkpoint import HISTORY_FILE, CheckpointManifest, Progress
from forge_ray.gr.health import VALIDATION_ERROR
from forge_ray.gr.run_folder import FoundCheckpoint, RunFolder
from forge_ray.gr.telling import Telling, tell_again
from tests.gr.test_run_folder import IDENTITY


class Watcher(UserCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        self.rows.extend(metrics)

    @property
    def steps(self) -> list[int]:
        return [row["global_step"] for row in self.rows]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(str(tmp_path), "run")


def found_after(*steps: int) -> FoundCheckpoint:
    """A checkpoint whose history holds these validations."""
    history = tuple(history_row(step) for step in steps)
    progress = Progress(max(steps, default=0) + 20, Cursor(1, 2, 3), 99, history, None)
    return FoundCheckpoint("a", CheckpointManifest(IDENTITY, progress, 1, {}))


def failed_row(step: int) -> dict[str, Any]:
    """Of a step whose validation failed."""
    return {"global_step": step, "loss": 1.0, "ItemNDCG@10": None, VALIDATION_ERROR: "OSError: x"}


def history_row(step: int) -> dict[str, Any]:
    return {"global_step": step, "loss": 1.0 / step, "ItemHit@10/tail": 0.5}


class Run:
    """A run whose workers write their history before they report."""

    def __init__(self, folder: RunFolder, found: FoundCheckpoint) -> None:
        self.folder, self.watcher = folder, Watcher()
        self.telling = Telling(folder, [self.watcher], found)

    def write(self, *steps: int) -> None:
        self.folder.write_json([history_row(step) for step in steps], HISTORY_FILE)

    def report(self, step: int, *, group: float) -> None:
        row = {"global_step": step, "loss": 1.0 / step, "workers_started": group}
        self.telling.after_report(None, [row, {**row, "loss": -1.0}], None)


NOTHING = FoundCheckpoint("", None)


def test_the_row_of_rank_0_is_told(folder: RunFolder) -> None:
    run = Run(folder, NOTHING)
    run.report(20, group=1.0)
    run.report(40, group=1.0)
    assert run.watcher.steps == [20, 40]
    assert [row["loss"] for row in run.watcher.rows] == [1 / 20, 1 / 40]


def test_a_row_that_died_with_its_worker_is_told_before_the_next(folder: RunFolder) -> None:
    run = Run(folder, NOTHING)
    run.write(20)
    run.report(20, group=1.0)
    run.write(20, 40)  # reported, and killed before anyone fetched it
    run.write(20, 40, 60)
    run.report(60, group=2.0)
    assert run.watcher.steps == [20, 40, 60]
    assert "ItemHit@10/tail" not in run.watcher.rows[1]


def test_rows_without_figures_are_not_told(folder: RunFolder) -> None:
    progress = Progress(60, Cursor(1, 2, 3), 99, (history_row(20), failed_row(40)), None)
    found = FoundCheckpoint("a", CheckpointManifest(IDENTITY, progress, 1, {}))
    watcher, run = Watcher(), Run(folder, NOTHING)
    tell_again(found, [watcher])
    assert watcher.steps == [20]
    folder.write_json([history_row(20), failed_row(40), history_row(60)], HISTORY_FILE)
    run.report(60, group=2.0)
    assert run.watcher.steps == [20, 60]


def test_a_row_that_a_new_group_measures_again_is_told_once(folder: RunFolder) -> None:
    run = Run(folder, NOTHING)
    for step, group in ((20, 1.0), (40, 1.0), (40, 2.0), (60, 2.0)):
        run.write(*range(20, step + 1, 20))
        run.report(step, group=group)
    assert run.watcher.steps == [20, 40, 60]


def test_what_was_told_before_the_start_is_not_told_again(folder: RunFolder) -> None:
    """The driver repeats the rows of the checkpoint itself; the pending one is still to come."""
    found, watcher = found_after(20, 40), Watcher()
    tell_again(found, [watcher])
    assert watcher.steps == [20, 40]
    assert "ItemHit@10/tail" not in watcher.rows[0]
    run = Run(folder, found)
    run.write(20, 40, 60)  # the last driver's workers wrote 60 and saved nothing after it
    run.report(60, group=1.0)
    assert run.watcher.steps == [60]
    tell_again(NOTHING, [watcher])
    assert watcher.steps == [20, 40]


def test_it_travels_to_the_controller(folder: RunFolder) -> None:
    telling = cloudpickle.loads(cloudpickle.dumps(Telling(folder, [], found_after(20))))
    telling.after_report(None, [{"global_step": 40, "workers_started": 1.0}], None)
