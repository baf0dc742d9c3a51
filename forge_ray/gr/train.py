"""Training of one generator by Ray Train: driver side and worker side.

The driver starts a `TorchTrainer` of fixed size, from a plain process or from inside a Tune trial.
Every worker streams the same global batches, takes its share, and reports its own shard; Ray merges
the shards into one checkpoint. A run is known by its name: the same name continues after a crash of
a worker (by itself) or of the driver (by the same call), and a changed configuration is refused.

Source of the layout: Ray Train V2 with DeepSpeed engines in the loop; see docs/decisions.md.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from forge_ray.artifacts import (
    Artifact,
    ArtifactInfo,
    ArtifactStore,
    ArtifactWriter,
    open_filesystem,
)
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.data.stream import SequenceStream, StreamBatch, prefetched
from forge_ray.errors import ConfigError, ForgeError, TrainingError
from forge_ray.gr.checkpoint import (
    HISTORY_FILE,
    MODEL_KIND,
    WEIGHTS_FILE,
    CheckpointManifest,
    Progress,
    RunIdentity,
    build_generator,
    config_hash,
    read_manifest,
    save_weights,
    table_key,
    write_manifest,
)
from forge_ray.gr.config import GrConfig
from forge_ray.gr.engine import TAG, Engine, expected_shards
from forge_ray.gr.models.base import TokenBatch
from forge_ray.sid.table import SidTable
from forge_ray.threads import set_threads

if TYPE_CHECKING:
    import ray
    import ray.train
    from torch import Tensor

logger = logging.getLogger(__name__)

SELECTION_METRIC = "ItemNDCG@10"
RUN_FILE = "forge-run.json"
_CONTROLLER_RETRIES = 60
"""Attempts, a minute each, to get the workers' resources before a run gives up."""


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        artifact: the published model, of kind `model`.
        metrics: the row of its best validation.
        history: one row per validation, oldest first.
    """

    artifact: Artifact
    metrics: dict[str, Any]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class TrainJob:
    """What every worker gets."""

    config: GrConfig
    dataset: Dataset
    codes: ray.ObjectRef
    codebook_sizes: tuple[int, ...]
    identity: RunIdentity
    started: float


# ---- driver side ----


def train_generator(
    config: GrConfig,
    dataset: Dataset,
    table: SidTable,
    *,
    store: ArtifactStore,
    run_dir: str,
    name: str,
    callbacks: Sequence[ray.train.UserCallback] = (),
    command: str = "",
) -> TrainResult:
    """Trains a generator, or returns the model if this content was trained before.

    Args:
        config: of the run.
        dataset: its train part is streamed, its validation part sampled.
        table: SIDs of the dataset's items.
        store: where the model is published.
        run_dir: absolute path or URI that all nodes share; checkpoints go to `<run_dir>/<name>`.
        name: of the run and the model; the same name resumes.
        callbacks: Ray Train callbacks, told of every report. They are not called when the model
            was already there; its `history` holds the rows.
        command: shell command that repeats the run, for the manifest.

    Raises:
        ConfigError: The name belongs to a run with another configuration.
        TrainingError: The loss diverged, or workers were lost more often than allowed.
    """
    if table.num_items != dataset.num_items:
        raise ConfigError(
            f"the SID table must cover the dataset's {dataset.num_items} items, got "
            f"{table.num_items}. Fit semantic IDs on this dataset."
        )
    sid_key = table_key(table)
    content = {"gr": config.identity(), "table_key": sid_key}
    identity = RunIdentity(
        config_hash=config_hash(content),
        table_key=sid_key,
        dataset_key=dataset.key,
        zero_stage=config.engine.zero_stage,
        precision=config.engine.precision,
        world_size=config.num_workers,
    )

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        _claim_run(run_dir, name, identity)
        best, history = _fit(
            config,
            dataset,
            table,
            identity=identity,
            run_dir=run_dir,
            name=name,
            callbacks=callbacks,
        )
        return _publish(writer, best, history)

    artifact = store.build(
        MODEL_KIND,
        name.replace("/", "-"),
        content,
        parents=[dataset.key, sid_key],
        produce=produce,
        command=command,
    )
    return train_result(artifact)


def train_result(artifact: Artifact) -> TrainResult:
    """The result that belongs to a published model."""
    history = json.loads(artifact.local(HISTORY_FILE).read_text(encoding="utf-8"))
    return TrainResult(artifact, dict(artifact.manifest.metrics), history)


def _claim_run(run_dir: str, name: str, identity: RunIdentity) -> None:
    """Writes who owns the run folder, or checks it: Ray resumes by name alone, whatever changed."""
    filesystem, root = open_filesystem(run_dir)
    path = f"{root}/{name}/{RUN_FILE}"
    if filesystem.get_file_info(path).is_file:
        with filesystem.open_input_stream(path) as source:
            owner = json.loads(source.read().decode())["config_hash"]
        if owner == identity.config_hash:
            return
        raise ConfigError(
            f"{path} must belong to this configuration ({identity.config_hash[:12]}), got "
            f"{owner[:12]}. Choose another name, or remove that folder to start afresh."
        )
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with filesystem.open_output_stream(path) as sink:
        sink.write(json.dumps({"config_hash": identity.config_hash}).encode())


def _fit(
    config: GrConfig,
    dataset: Dataset,
    table: SidTable,
    *,
    identity: RunIdentity,
    run_dir: str,
    name: str,
    callbacks: Sequence[ray.train.UserCallback],
) -> tuple[ray.train.Checkpoint, list[dict[str, Any]]]:
    """Runs the trainer; the best checkpoint and all rows."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    job = TrainJob(
        config=config,
        dataset=dataset,
        codes=ray.put(np.asarray(table.codes)),
        codebook_sizes=table.codebook_sizes,
        identity=identity,
        started=time.time(),
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={
                "CPU": config.cpus_per_worker,
                **({"GPU": 1} if config.use_gpu else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=run_dir,
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=_CONTROLLER_RETRIES
            ),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=config.keep_checkpoints,
                checkpoint_score_attribute=SELECTION_METRIC,
                checkpoint_score_order="max",
            ),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error, name) from error
    return _best(result, name)


def _best(result: ray.train.Result, name: str) -> tuple[ray.train.Checkpoint, list[dict[str, Any]]]:
    """The best checkpoint of a finished run, and the rows that its newest one holds."""
    if result.checkpoint is None or not result.best_checkpoints:
        raise TrainingError(
            f"run {name!r} must end with a checkpoint, got a loss that is not finite before the "
            "first one. Lower engine.learning_rate."
        )
    if not math.isfinite((result.metrics or {}).get("loss", 0.0)):
        raise TrainingError(
            f"run {name!r} must keep a finite loss, got {result.metrics['loss']} at step "
            f"{result.metrics['global_step']}. Lower engine.learning_rate."
        )
    best, _ = max(result.best_checkpoints, key=lambda one: one[1].get(SELECTION_METRIC, -1.0))
    with result.checkpoint.as_directory() as folder:
        rows = json.loads(Path(folder, HISTORY_FILE).read_text(encoding="utf-8"))
    return best, rows


def _publish(
    writer: ArtifactWriter, best: ray.train.Checkpoint, history: list[dict[str, Any]]
) -> ArtifactInfo:
    """Copies the best checkpoint's weights into the artifact; DeepSpeed's shards stay behind."""
    with best.as_directory() as folder, writer.local_path(WEIGHTS_FILE) as target:
        shutil.copyfile(Path(folder, WEIGHTS_FILE), target)
        rows = json.loads(Path(folder, HISTORY_FILE).read_text(encoding="utf-8"))
    with writer.open(HISTORY_FILE) as sink:
        sink.write(json.dumps(history).encode())
    return ArtifactInfo(rows={"steps": history[-1]["global_step"]}, metrics=rows[-1])


def _cause(error: Exception, name: str) -> ForgeError:
    """Our own error when a worker raised one, else a summary of the first failure."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        for candidate in (failure, failure.__cause__, getattr(failure, "_base_exc", None)):
            if isinstance(candidate, ForgeError):
                return candidate
    first = next(iter(failures.values()), error)
    line = str(first).strip().splitlines()[-1] if str(first).strip() else type(first).__name__
    return TrainingError(
        f"run {name!r} must keep its workers, got: {line}. The same command resumes it from the "
        "last checkpoint; --verbose shows the workers' log."
    )


# ---- worker side ----


def train_worker(settings: Mapping[str, Any]) -> None:
    """Entry point of a Ray Train worker."""
    import ray
    import ray.train

    job: TrainJob = settings["job"]
    set_threads(job.config.cpus_per_worker)
    trainer = _Worker(job, np.asarray(ray.get(job.codes)))
    trainer.restore(ray.train.get_checkpoint())
    trainer.run()


@dataclass
class _Interval:
    """What is measured between two reports."""

    loss: float = 0.0
    steps: int = 0
    tokens: int = 0
    wait_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)


class _Worker:
    """The training loop of one rank."""

    def __init__(self, job: TrainJob, codes: NDArray[np.unsignedinteger[Any]]) -> None:
        config = job.config
        self._job = job
        self._config = config
        self._table = SidTable(codes, job.codebook_sizes, resolver="", key=job.identity.table_key)
        torch.manual_seed(config.seed)
        generator = build_generator(config.model, self._table)
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

    def restore(self, checkpoint: ray.train.Checkpoint | None) -> None:
        """Continues from a checkpoint, if there is one."""
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            manifest = read_manifest(Path(folder), self._job.identity)
            self._engine.load(Path(folder))
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
        """Validates, checkpoints and tells Ray; False when the loss is no longer finite.

        Every worker calls it at the same steps: it holds collectives and a barrier.
        """
        import ray.train

        row = self._training_row()
        if not math.isfinite(row["loss"]):
            ray.train.report(row)  # same decision on every rank: the loss is a sum over all
            return False
        weights = self._engine.full_state()
        is_first = self._engine.rank == 0
        if is_first:
            row |= self._validate(weights)
        self._progress = replace(self._progress, history=(*self._progress.history, row))
        folder = Path(tempfile.mkdtemp(prefix="forge-ray-checkpoint-"))
        self._engine.save(folder)
        if is_first:
            self._describe(folder, weights)
        ray.train.report(
            {name: value for name, value in row.items() if "/" not in name},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=f"step_{self._progress.step:08d}",
        )
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
