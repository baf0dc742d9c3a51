"""The training loop of one worker, whoever started it.

Streams its share of the global batches, steps the engine, and at validation points writes a
checkpoint and asks for its metrics, which it takes up while training goes on. Every decision (a
loss that left, a metric that stands, a request to stop) is taken by all workers at the same step.
Knows nothing about Ray: what it tells and asks goes through `LoopHooks`.

::

    step ... step, check-up, step ... step, check-up, validation point
    validation point: take up the metrics of the one before, checkpoint, ask for metrics
    a node that is about to go: checkpoint, end
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.errors import ArtifactError, ForgeError
from forge_ray.gr.batches import micro_batches, with_scripts
from forge_ray.gr.checkpoint import (
    HISTORY_FILE,
    LOSSES_FILE,
    WEIGHTS_FILE,
    CheckpointManifest,
    Progress,
    RunIdentity,
    save_weights,
)
from forge_ray.gr.config import GrConfig
from forge_ray.gr.engine import TAG, Engine, expected_shards
from forge_ray.gr.health import (
    MAX_FAILED_VALIDATIONS,
    SELECTION_METRIC,
    VALIDATION_ERROR,
    VALIDATION_WARNING,
    LossWatch,
    best_row,
    has_settled,
)
from forge_ray.gr.initial import INITIAL_FILE
from forge_ray.gr.mixture import MixedBatch, Mixture, TextData
from forge_ray.gr.models.base import Generator, TokenBatch
from forge_ray.gr.run_folder import (
    BEST,
    CHECKPOINTS,
    OUTCOME_FILE,
    FoundCheckpoint,
    RunFolder,
    checkpoint_name,
)
from forge_ray.gr.tasks import ITEM_TASK
from forge_ray.gr.vocab import vocab_of

logger = logging.getLogger(__name__)

_CHECKUP_STEPS = 10
"""Steps between two collectives that share losses and requests: one small message each."""
PREEMPTED = "preempted"
UNVALIDATED = "unvalidated"
_NOTHING = FoundCheckpoint("", None)


@dataclass(frozen=True)
class TrainJob:
    """What every worker gets.

    Attributes:
        config: of the run.
        dataset: handle of the data.
        codebook_sizes: of the SID table.
        identity: what a checkpoint must agree with.
        folder: of the run.
        started: `time.time()` at which the run was asked for; measures the start-up.
        group: what the counters of several runs have in common.
        text: what the tasks with text read; None for a training on histories alone.
    """

    config: GrConfig
    dataset: Dataset
    codebook_sizes: tuple[int, ...]
    identity: RunIdentity
    folder: RunFolder
    started: float
    group: str = ""
    text: TextData | None = None


class Validation(Protocol):
    """Computes metrics of checkpoints; only rank 0 has one."""

    def submit(self, step: int, best: float) -> None:
        """Asks for the metrics of a step's checkpoint; weights above `best` are kept."""

    def is_ready(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> dict[str, Any]:
        """The metrics that were asked for last; waits for them, raises what their making raised."""


@dataclass(frozen=True)
class LoopHooks:
    """The outside of a loop.

    Attributes:
        report: tells the trainer a row of metrics; a barrier that every worker calls equally often.
        validation: of rank 0, None elsewhere.
        poll: asked by rank 0 at check-ups, must be quick; "stop" asks the run to save and end,
            "look" makes all workers call `is_preempted`.
        is_preempted: whether a worker's node is about to go; a collective.
        count: of rank 0: told what to add to the counters of `forge_ray.gr.meters`.
    """

    report: Callable[[dict[str, Any]], None]
    validation: Validation | None
    poll: Callable[[], str]
    is_preempted: Callable[[], bool]
    count: Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class Ending:
    """How training ended.

    Attributes:
        kind: `finished`, `settled` (early stopping), `stopped` (on request), `preempted` (a node
            goes: whoever started the run starts it again), `diverged`, `unvalidated` (validations
            fail; the last checkpoint waits for its own).
        reason: in words, for the last four.
    """

    kind: str
    reason: str = ""


@dataclass(frozen=True)
class _Signs:
    """What a check-up found; the same on all workers."""

    trouble: str
    is_validated: bool
    is_stopping: bool
    must_look: bool


@dataclass
class _Interval:
    """What is measured between two validation points."""

    tokens: int = 0
    wait_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)


def _start(job: TrainJob) -> Generator:
    """The generator with the weights that training begins with."""
    vocab = vocab_of(job.codebook_sizes)
    if not job.config.initial.model:
        return job.config.model.start(vocab)
    generator = job.config.model.build(vocab)
    with job.folder.local(INITIAL_FILE) as path:
        generator.load_state_dict(load_file(str(path)))
    return generator


def reported(row: dict[str, Any]) -> dict[str, Any]:
    """What the trainer is told of a row of the history: all but the metrics of slices."""
    return {name: value for name, value in row.items() if "/" not in name}


class TrainLoop:
    """The training loop of one rank."""

    def __init__(
        self, job: TrainJob, codes: NDArray[np.unsignedinteger[Any]], hooks: LoopHooks
    ) -> None:
        """Builds model, engine and stream; every rank does so with the same job.

        Args:
            job: the run.
            codes: [num_items, L], kept resident.
            hooks: the outside.
        """
        config = job.config
        self._hooks = hooks
        self._job = job
        self._config = config
        self._codes = codes
        torch.manual_seed(config.seed)
        generator = _start(job)
        self._engine = Engine(
            generator,
            config.engine,
            max_steps=config.max_steps,
            seed=config.seed,
            use_gpu=config.use_gpu,
        )
        self._vocab = vocab_of(job.codebook_sizes)
        self._mixture = Mixture(
            config,
            job.dataset,
            job.text,
            num_levels=self._vocab.num_levels,
            rank=self._engine.rank,
            world_size=self._engine.world_size,
        )
        self._progress = Progress()
        self._losses: list[float] = []  # of every step, over all workers
        self._unshared: list[Tensor] = []  # this worker's, since the last check-up
        self._watch = LossWatch(config.stop)
        self._interval = _Interval()
        self._uncounted = _Interval()
        self._warnings: tuple[str, ...] = ()
        self._num_failed = 0  # validations in a row, since this attempt began
        self._blindness = ""
        self._startup_s: float | None = None

    def close(self) -> None:
        """Lets model and optimiser go; for a process that trains again."""
        self._engine.close()

    def restore(self) -> None:
        """Continues from the newest whole checkpoint of the run, if there is one.

        Raises:
            ArtifactError: The checkpoints belong to another run.
        """
        folder = self._job.folder
        # Rank 0 decides for all: others may see the files of a network disk later.
        found = self._engine.from_first(
            folder.newest_checkpoint(self._job.identity) if self._is_first else _NOTHING
        )
        self._warnings = found.warnings
        if self._is_first:
            for warning in found.warnings:
                logger.warning(warning)
            folder.drop_unusable(found.name)
        manifest = found.manifest
        if manifest is None:
            return
        with folder.checkpoint(found.name, list(manifest.files)) as files:
            self._engine.load(files, world_size=manifest.world_size)
            self._losses = np.load(files / LOSSES_FILE).tolist()
        self._watch.follow(self._losses, 1)
        self._progress = manifest.progress
        logger.info("resumed at step %d", self._progress.step)
        self._ask_again()

    def run(self) -> Ending:
        """Trains to the end; every rank returns the same."""
        ending = Ending("finished") if self._is_over() else self._train()
        if ending.kind in ("finished", "settled"):
            self._take_up_metrics(is_last=True)
            if self._blindness:
                ending = Ending(UNVALIDATED, self._blindness)
        if self._is_first:
            if ending.kind == "diverged":
                # What was saved since the loss left is nothing to continue from.
                self._job.folder.drop_unusable(checkpoint_name(self._watch.last_good))
            self._write_outcome(ending)
        self._engine.barrier()
        return ending

    @property
    def _is_first(self) -> bool:
        return self._engine.rank == 0

    @property
    def _epoch(self) -> int:
        """Of the histories; of the first other task where there are none."""
        others = [one.epoch for one in self._progress.cursors.values()]
        return self._progress.cursor.epoch if ITEM_TASK in self._config.shares else others[0]

    def _is_point(self) -> bool:
        step = self._progress.step
        return step % self._config.validation.every == 0 or step >= self._config.max_steps

    def _is_over(self) -> bool:
        """Whether the validation point just passed is the last one; metrics may be pending."""
        if self._progress.step >= self._config.max_steps:
            return True
        settled = has_settled(self._progress.history, self._config.stop.patience)
        return self._progress.step > 0 and self._is_point() and settled

    def _train(self) -> Ending:
        """Steps until the last validation point, or until something else ends the run."""
        self._interval, self._uncounted = _Interval(), _Interval()
        cursors = {**self._progress.cursors, ITEM_TASK: self._progress.cursor}
        with self._mixture.batches(cursors) as batches:
            while True:
                self._step(batches)
                if not self._is_point() and self._progress.step % _CHECKUP_STEPS:
                    continue
                ending = self._pause()
                if ending is not None:
                    return ending

    def _pause(self) -> Ending | None:
        """Check-up, and what it calls for; an ending if training is over."""
        signs = self._check_up()
        if signs.trouble:
            return Ending("diverged", signs.trouble)
        is_preempted = signs.must_look and self._hooks.is_preempted()
        if self._is_point():
            trouble = self._pass_point()
        else:
            if signs.is_validated:
                self._take_up_metrics()
            must_save = is_preempted or signs.is_stopping or self._blindness
            trouble = self._checkpoint() if must_save else ""
        if trouble:
            return Ending("diverged", trouble)
        if self._blindness:
            return Ending(UNVALIDATED, self._blindness)
        if self._is_point() and self._is_over():
            is_last = self._progress.step >= self._config.max_steps
            return Ending("finished" if is_last else "settled")
        if signs.is_stopping:
            return Ending("stopped", "a request to stop")
        return Ending(PREEMPTED, "a node that goes") if is_preempted else None

    def _step(self, batches: Iterator[MixedBatch]) -> None:
        """One optimiser step on the next global batch."""
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        targets = batch.script_targets
        if batch.items is not None:
            lengths = torch.from_numpy(batch.items.global_lengths)
            targets += self._engine.module.num_targets(lengths)
        step = self._progress.step + 1
        loss = self._engine.step(self._passes(batch), num_targets=targets, step=step)
        others = dict(batch.following)
        self._progress = replace(
            self._progress,
            step=step,
            cursor=others.pop(ITEM_TASK, self._progress.cursor),
            tokens=self._progress.tokens + targets,
            cursors=others,
        )
        self._unshared.append(loss)
        for one in (self._interval, self._uncounted):
            one.tokens += targets
            one.wait_s += waited
        if self._startup_s is None:
            self._startup_s = time.time() - self._job.started

    def _passes(self, batch: MixedBatch) -> list[TokenBatch]:
        """This worker's rows of a step, as its forward passes."""
        rows = Ragged.from_lists([], dtype="int32") if batch.items is None else batch.items.rows
        found = micro_batches(
            rows, self._codes, self._engine.accumulation, is_packed=self._config.model.packs
        )
        if batch.scripts is None:
            return found
        return with_scripts(found, batch.scripts, self._codes, self._vocab)

    def _check_up(self) -> _Signs:
        """Shares losses and requests; every worker calls it at the same steps."""
        flags = [0.0, 0.0, 0.0]
        if self._is_first:
            self._count()
            asked = self._hooks.poll()
            flags = [float(self._is_validated()), float(asked == "stop"), float(asked == "look")]
        mine = torch.stack(self._unshared).double().tolist()
        self._unshared = []
        *losses, validated, stopping, look = self._engine.sum_over_workers([*mine, *flags])
        trouble = self._watch.follow(losses, len(self._losses) + 1)
        self._losses.extend(losses)
        return _Signs(trouble, validated > 0, stopping > 0, look > 0)

    def _count(self) -> None:
        one, self._uncounted = self._uncounted, _Interval()
        self._hooks.count(
            {
                "forge_train_tokens": one.tokens,
                "forge_train_seconds": self._uncounted.started - one.started,
                "forge_train_input_wait_seconds": one.wait_s,
            }
        )

    def _is_validated(self) -> bool:
        validation = self._hooks.validation
        return validation is not None and bool(self._progress.pending) and validation.is_ready()

    def _pass_point(self) -> str:
        """Takes up the metrics of the point before, checkpoints, asks for metrics of this one.

        Returns:
            Why the weights cannot be kept, or an empty string.
        """
        row = self._training_row()
        self._take_up_metrics()
        self._progress = replace(self._progress, pending=row)
        trouble = self._checkpoint()
        if not trouble:
            self._ask_together()
        self._interval = _Interval()
        return trouble

    def _ask(self) -> None:
        history = self._progress.history
        at = best_row(history)
        best = history[at][SELECTION_METRIC] if at >= 0 else -1.0
        if self._hooks.validation is not None and self._progress.pending:
            self._hooks.validation.submit(self._progress.pending["global_step"], best)

    def _ask_together(self) -> None:
        """Asks; every worker calls it."""
        self._ask()
        # Rank 0 may have decoded meanwhile. The next step would be waited for in DeepSpeed's own
        # process group, which gives up after torch's default of 10 (NCCL) or 30 minutes.
        self._engine.barrier()

    def _ask_again(self) -> None:
        """Asks for the metrics that a resumed run was waiting for."""
        pending = self._progress.pending
        if not pending:
            return
        folder, name = self._job.folder, checkpoint_name(pending["global_step"])
        if self._engine.from_first(self._is_first and folder.is_whole(name, WEIGHTS_FILE)):
            self._ask_together()
            return
        if self._is_first:
            logger.warning(
                "%s was not validated before its weights were damaged; it is left out of the "
                "validations",
                folder.path(CHECKPOINTS, name, WEIGHTS_FILE),
            )
        self._progress = replace(self._progress, pending=None)

    def _take_up_metrics(self, *, is_last: bool = False) -> None:
        """Completes the pending row with its metrics and reports it; every worker calls it.

        A validation that fails costs its figures: the row says so and nobody is told of it. The
        last one of a run chooses its weights; it is tried twice and stays to be asked for again.
        """
        if self._progress.pending is None:
            return
        row = self._engine.from_first(self._validated(self._progress.pending, is_last=is_last))
        error = row.get(VALIDATION_ERROR, "")
        self._num_failed = self._num_failed + 1 if error else 0
        if error and (is_last or self._num_failed >= MAX_FAILED_VALIDATIONS):
            where = "the last validation" if is_last else f"{self._num_failed} in a row"
            self._blindness = f"validation errors in {where}, now {error}"
        if error and is_last:
            return
        history = (*self._progress.history, row)
        self._progress = replace(self._progress, pending=None, history=history)
        if self._is_first:
            self._job.folder.write_json(list(history), HISTORY_FILE)
        if error:
            return
        if self._is_first:
            self._drop_surpassed()
        self._hooks.report(reported(row))

    def _validated(self, row: dict[str, Any], *, is_last: bool) -> dict[str, Any]:
        """A row with the metrics of its checkpoint, or with the error in their place."""
        validation = self._hooks.validation
        if validation is None:
            return row
        began, step = time.perf_counter(), row["global_step"]
        try:
            found = validation.result()
        except ForgeError:
            raise  # its message says what to change; time changes nothing
        except Exception as error:  # noqa: BLE001  (of memory, a disk, a device; marked and told)
            text = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            self._warn(f"step {step} has no validation figures: {text}")
            if is_last:
                self._ask()
                return self._validated(row, is_last=False)
            found = {SELECTION_METRIC: None, VALIDATION_ERROR: text}
        self._warn(found.get(VALIDATION_WARNING, ""))
        row = {**row, **{name: one for name, one in found.items() if name != VALIDATION_WARNING}}
        row["validation_wait_s"] = round(time.perf_counter() - began, 2)
        return row

    def _warn(self, warning: str) -> None:
        """Says something once, here and where the run was started from."""
        if warning and warning not in self._warnings:
            logger.warning(warning)
            self._warnings = (*self._warnings, warning)

    def _drop_surpassed(self) -> None:
        """Deletes best weights that no kept checkpoint could still call its best."""
        history = self._progress.history
        first = max(1, len(history) - self._config.keep_checkpoints)
        best = {best_row(history[:count]) for count in range(first, len(history) + 1)}
        needed = {history[at]["global_step"] for at in best if at >= 0}
        kept = {f"{checkpoint_name(step)}.safetensors" for step in needed}
        for name in self._job.folder.names(BEST):
            if name not in kept:
                self._job.folder.delete(BEST, name)

    def _training_row(self) -> dict[str, Any]:
        interval, history = self._interval, self._progress.history
        seconds = time.perf_counter() - interval.started
        (wait,) = self._engine.sum_over_workers([interval.wait_s])
        last = self._progress.pending or (history[-1] if history else {"global_step": 0})
        return {
            "stage": "gr",
            "global_step": self._progress.step,
            "epoch": self._epoch,
            "train_tokens": self._progress.tokens,
            "loss": float(np.mean(self._losses[last["global_step"] :])),
            "tokens_per_s": round(interval.tokens / seconds, 1),
            "input_wait_share": round(wait / self._engine.world_size / seconds, 4),
            "startup_s": round(self._startup_s or 0.0, 2),
            "num_threads": torch.get_num_threads(),
            "num_workers": self._engine.world_size,
        }

    def _checkpoint(self) -> str:
        """Writes a checkpoint; every worker calls it at the same step.

        Returns:
            Why it was not written, or an empty string.
        """
        began = time.perf_counter()
        weights = self._engine.full_state()
        # The loss is that of the weights before the last update, which may have ruined them. Rank 0
        # has them.
        is_sound = all(bool(torch.isfinite(value).all()) for value in weights.values())
        if not self._engine.from_first(is_sound):
            return f"weights that are not finite after step {self._progress.step}"
        folder, name = self._job.folder, checkpoint_name(self._progress.step)
        if self._is_first:
            folder.clear_checkpoint(name)
        self._engine.barrier()
        with folder.new_checkpoint(name) as local:
            self._engine.save(local)
            if self._is_first:
                save_weights(local / WEIGHTS_FILE, weights)
                np.save(local / LOSSES_FILE, np.array(self._losses))
        self._engine.barrier()
        if self._is_first:
            # While the loss may be leaving, the checkpoints from before it did must not go.
            keep = 0 if self._watch.is_bad else self._config.keep_checkpoints
            folder.commit(name, self._manifest(name), keep=keep)
            seconds = time.perf_counter() - began
            self._hooks.count({"forge_checkpoints": 1, "forge_checkpoint_seconds": seconds})
        return ""

    def _manifest(self, name: str) -> CheckpointManifest:
        config, workers = self._config.engine, self._engine.world_size
        shards = expected_shards(config.zero_stage, workers, config.precision)
        written = self._job.folder.sizes(name)
        wanted = [WEIGHTS_FILE, LOSSES_FILE, *(f"{TAG}/{shard}" for shard in shards)]
        missing = [file for file in wanted if file not in written]
        if missing:
            raise ArtifactError(
                f"{self._job.folder.uri}/{CHECKPOINTS}/{name} must hold the shards of {workers} "
                f"workers, got none of {', '.join(missing)}. Give all nodes the same --run-dir."
            )
        files = {file: written[file] for file in wanted}
        return CheckpointManifest(self._job.identity, self._progress, workers, files)

    def _write_outcome(self, ending: Ending) -> None:
        """What the driver reads once all workers have ended."""
        outcome = {
            "kind": ending.kind,
            "reason": ending.reason,
            "step": self._progress.step,
            "losses": self._losses,
            "warnings": list(self._warnings),
        }
        self._job.folder.write_json(outcome, OUTCOME_FILE)
