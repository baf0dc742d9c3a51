"""The training loop of one worker, whoever started it.

Streams its share of the global batches, steps the engine, validates, and hands rows of metrics and
its part of each checkpoint to a callback. Knows nothing about Ray, runs or names.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.data.stream import SequenceStream, StreamBatch, prefetched
from forge_ray.errors import ConfigError
from forge_ray.gr.checkpoint import (
    HISTORY_FILE,
    WEIGHTS_FILE,
    CheckpointManifest,
    Progress,
    RunIdentity,
    build_generator,
    read_manifest,
    save_weights,
    write_manifest,
)
from forge_ray.gr.config import GrConfig
from forge_ray.gr.engine import TAG, Engine, expected_shards
from forge_ray.gr.models.base import TokenBatch
from forge_ray.gr.vocab import vocab_of
from forge_ray.sid.table import SidTable

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any], "Path | None"], None]
"""Takes a row of metrics and a checkpoint folder; a barrier that every rank calls equally often."""


@dataclass(frozen=True)
class TrainJob:
    """What every worker gets.

    Attributes:
        config: of the run.
        dataset: handle of the data.
        codebook_sizes: of the SID table.
        identity: what a checkpoint must agree with.
        started: `time.time()` at which the run was asked for; measures the start-up.
    """

    config: GrConfig
    dataset: Dataset
    codebook_sizes: tuple[int, ...]
    identity: RunIdentity
    started: float


@dataclass
class _Interval:
    """What is measured between two reports."""

    loss: float = 0.0
    steps: int = 0
    tokens: int = 0
    wait_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)


class TrainLoop:
    """The training loop of one rank."""

    def __init__(
        self, job: TrainJob, codes: NDArray[np.unsignedinteger[Any]], report: Report
    ) -> None:
        """Builds model, engine and stream; every rank does so with the same job.

        Args:
            job: the run.
            codes: [num_items, L], kept resident.
            report: tells the trainer of a row of metrics and of this rank's part of a checkpoint.
        """
        config = job.config
        self._tell = report
        self._job = job
        self._config = config
        self._table = SidTable(codes, job.codebook_sizes, resolver="", key=job.identity.table_key)
        torch.manual_seed(config.seed)
        generator = config.model.start(vocab_of(job.codebook_sizes))
        self._engine = Engine(
            generator, config.engine, max_steps=config.max_steps, seed=config.seed
        )
        self._stream = SequenceStream(
            job.dataset.sequence_files("train"),
            job.dataset.filesystem,
            config.data,
            plan=config.plan,
            rank=self._engine.rank,
            world_size=self._engine.world_size,
        )
        self._progress = Progress()
        self._interval = _Interval()
        self._startup_s: float | None = None

    def restore(self, folder: Path) -> None:
        """Continues from a checkpoint that holds the shards of all ranks."""
        manifest = read_manifest(folder, self._job.identity)
        self._engine.load(folder)
        self._progress = manifest.progress
        logger.info("resumed at step %d", self._progress.step)

    def run(self) -> None:
        """Trains to the last step, reporting at every validation."""
        config = self._config
        if self._progress.step >= config.max_steps:
            return
        batches = prefetched(
            self._stream.batches(self._progress.cursor), config.data.prefetch_batches
        )
        self._interval = _Interval()
        while self._progress.step < config.max_steps:
            self._step(batches)
            step = self._progress.step
            if step % config.validation.every and step < config.max_steps:
                continue
            if not self._report():
                break
            self._interval = _Interval()
        batches.close()

    def _step(self, batches: Generator[StreamBatch, None, None]) -> None:
        """One optimiser step on the next global batch."""
        began = time.perf_counter()
        batch = next(batches)
        self._interval.wait_s += time.perf_counter() - began
        targets = self._engine.module.num_targets(torch.from_numpy(batch.global_lengths))
        step = self._progress.step + 1
        loss = self._engine.step(
            micro_batches(batch.rows, self._table.codes, self._engine.accumulation),
            num_targets=targets,
            step=step,
        )
        self._progress = replace(
            self._progress,
            step=step,
            cursor=batch.following,
            tokens=self._progress.tokens + targets,
        )
        self._interval.loss += loss.item()
        self._interval.steps += 1
        self._interval.tokens += targets
        if self._startup_s is None:
            self._startup_s = time.time() - self._job.started

    def _report(self) -> bool:
        """Validates, checkpoints and reports; False when the loss is no longer finite.

        Every worker calls it at the same steps: it holds collectives and a barrier.
        """
        row = self._training_row()
        if not math.isfinite(row["loss"]):
            self._tell(row, None)  # same decision on every rank: the loss is a sum over all
            return False
        weights = self._engine.full_state()
        is_first = self._engine.rank == 0
        if is_first:
            row |= self._validate(weights)
        self._progress = replace(self._progress, history=(*self._progress.history, row))
        folder = Path(tempfile.mkdtemp(prefix="forge-ray-checkpoint-"))
        try:
            self._engine.save(folder)
            if is_first:
                self._describe(folder, weights)
            self._tell({name: value for name, value in row.items() if "/" not in name}, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _training_row(self) -> dict[str, Any]:
        interval = self._interval
        seconds = time.perf_counter() - interval.started
        total, wait = self._engine.sum_over_workers([interval.loss, interval.wait_s])
        return {
            "stage": "gr",
            "global_step": self._progress.step,
            "epoch": self._progress.cursor.epoch,
            "train_tokens": self._progress.tokens,
            "loss": total / interval.steps,
            "tokens_per_s": round(interval.tokens / seconds, 1),
            "input_wait_share": round(wait / self._engine.world_size / seconds, 4),
            "startup_s": round(self._startup_s or 0.0, 2),
            "num_threads": torch.get_num_threads(),
        }

    def _validate(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Item-level metrics of the sampled users, by a copy that no sharding touches."""
        from forge_ray.gr.evaluation import evaluate_generator

        began = time.perf_counter()
        config = self._config.validation
        histories, targets = validation_sample(self._job.dataset, config.users)
        generator = build_generator(self._config.model, self._table)
        generator.load_state_dict(weights)
        metrics = evaluate_generator(
            generator.eval().to(self._engine.device),
            self._table,
            histories,
            targets,
            train_counts=self._job.dataset.train_counts(),
            max_history=self._config.max_history,
            ks=config.ks,
            widths=config.widths or None,
            batch_users=config.batch_users,
            device=self._engine.device,
        )
        return {**metrics, "validation_s": round(time.perf_counter() - began, 2)}

    def _describe(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Rank 0's files of a checkpoint: weights, rows and the manifest."""
        config = self._config.engine
        shards = expected_shards(config.zero_stage, self._engine.world_size, config.precision)
        save_weights(folder / WEIGHTS_FILE, weights)
        rows = json.dumps(list(self._progress.history))
        (folder / HISTORY_FILE).write_text(rows, encoding="utf-8")
        write_manifest(
            folder,
            CheckpointManifest(
                self._job.identity,
                self._progress,
                (WEIGHTS_FILE, HISTORY_FILE, *(f"{TAG}/{shard}" for shard in shards)),
            ),
        )


def validation_sample(dataset: Dataset, limit: int) -> tuple[Ragged, Ragged]:
    """Histories and targets of the first `limit` validation users, a fixed random sample.

    Raises:
        ConfigError: The dataset has no validation users.
    """
    batches = list(dataset.sequence_batches("validation", limit=limit))
    targets = [batch.targets for batch in batches if batch.targets is not None]
    if not targets:
        raise ConfigError(
            "dataset must have validation users, got none. Prepare it with a split that leaves "
            "some."
        )
    return Ragged.concatenate([batch.items for batch in batches]), Ragged.concatenate(targets)


def micro_batches(rows: Ragged, codes: NDArray[np.integer[Any]], count: int) -> list[TokenBatch]:
    """A rank's rows as exactly `count` batches, neighbours in length together.

    Args:
        rows: item indices, sorted by length; may be fewer than `count`.
        codes: [num_items, L].
        count: forward passes of the step; every rank makes the same number.
    """
    return [
        _token_batch(rows.take(part), codes) for part in np.array_split(np.arange(len(rows)), count)
    ]


def _token_batch(rows: Ragged, codes: NDArray[np.integer[Any]]) -> TokenBatch:
    if not len(rows):
        nothing = torch.zeros(1, 1, codes.shape[1], dtype=torch.int64)
        return TokenBatch(nothing, torch.zeros(1, dtype=torch.int64))
    padded = rows.padded(side="right", fill=0)
    return TokenBatch(
        torch.from_numpy(codes[padded].astype(np.int64)), torch.from_numpy(rows.lengths)
    )
