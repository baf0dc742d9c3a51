"""Training of one generator by Ray Train: driver side and worker side.

The driver starts a `TorchTrainer` of fixed size, from a plain process or from inside a Tune trial.
Every worker streams the same global batches, takes its share, and reports its own shard; Ray merges
the shards into one checkpoint. A run is known by its name: the same name continues after a crash of
a worker (by itself) or of the driver (by the same call), and a changed configuration is refused.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forge_ray.artifacts import (
    Artifact,
    ArtifactInfo,
    ArtifactStore,
    ArtifactWriter,
    open_filesystem,
)
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError, ForgeError, TrainingError, worker_error
from forge_ray.gr.checkpoint import (
    HISTORY_FILE,
    MODEL_KIND,
    WEIGHTS_FILE,
    RunIdentity,
    config_hash,
    table_key,
)
from forge_ray.gr.config import GrConfig
from forge_ray.gr.loop import TrainJob, TrainLoop
from forge_ray.sid.table import SidTable
from forge_ray.threads import set_threads

if TYPE_CHECKING:
    import ray
    import ray.train

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
    config = replace(config, model=config.model.resolved())
    content: dict[str, Any] = {"gr": config.identity(), "table_key": table_key(table)}
    identity = _run_identity(config, dataset, content)

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
        parents=[dataset.key, content["table_key"]],
        produce=produce,
        command=command,
    )
    return train_result(artifact)


def _run_identity(config: GrConfig, dataset: Dataset, content: dict[str, Any]) -> RunIdentity:
    return RunIdentity(
        config_hash=config_hash(content),
        table_key=content["table_key"],
        dataset_key=dataset.key,
        zero_stage=config.engine.zero_stage,
        precision=config.engine.precision,
        world_size=config.num_workers,
    )


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
        codebook_sizes=table.codebook_sizes,
        identity=identity,
        started=time.time(),
    )
    trainer = TorchTrainer(
        train_worker,
        # The codes lie in the object store once; every worker of a node reads them in place.
        train_loop_config={"job": job, "codes": ray.put(np.asarray(table.codes))},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=_scaling(config),
        run_config=_run_config(config, run_dir=run_dir, name=name, callbacks=callbacks),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error, name) from error
    return _best(result, name, config.max_steps)


def _scaling(config: GrConfig) -> ray.train.ScalingConfig:
    import ray.train

    gpus = {"GPU": 1} if config.use_gpu else {}
    return ray.train.ScalingConfig(
        num_workers=config.num_workers,
        use_gpu=config.use_gpu,
        resources_per_worker={"CPU": config.cpus_per_worker, **gpus},
    )


def _run_config(
    config: GrConfig, *, run_dir: str, name: str, callbacks: Sequence[ray.train.UserCallback]
) -> ray.train.RunConfig:
    import ray.train

    filesystem, root = open_filesystem(run_dir)
    return ray.train.RunConfig(
        name=name,
        storage_path=root,
        storage_filesystem=filesystem if "://" in run_dir else None,
        callbacks=list(callbacks),
        failure_config=ray.train.FailureConfig(
            max_failures=config.max_failures, controller_failure_limit=_CONTROLLER_RETRIES
        ),
        checkpoint_config=ray.train.CheckpointConfig(
            num_to_keep=config.keep_checkpoints,
            checkpoint_score_attribute=SELECTION_METRIC,
            checkpoint_score_order="max",
        ),
    )


def _best(
    result: ray.train.Result, name: str, max_steps: int
) -> tuple[ray.train.Checkpoint, list[dict[str, Any]]]:
    """The best checkpoint of a finished run, and the rows that its newest one holds."""
    rows: list[dict[str, Any]] = []
    if result.checkpoint is not None:
        with result.checkpoint.as_directory() as folder:
            rows = json.loads(Path(folder, HISTORY_FILE).read_text(encoding="utf-8"))
    reached = rows[-1]["global_step"] if rows else 0
    if reached < max_steps or not result.best_checkpoints:
        # A worker ends early for one reason only: it reports a loss without a checkpoint.
        raise TrainingError(
            f"run {name!r} must keep a finite loss up to step {max_steps}, got a loss that is not "
            f"after step {reached}. Lower engine.learning_rate."
        )
    best, _ = max(result.best_checkpoints, key=lambda one: one[1].get(SELECTION_METRIC, -1.0))
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
    return worker_error(
        error,
        f"run {name!r} must keep its workers",
        "The same command resumes it from the last checkpoint; --verbose shows the workers' log.",
    )


def train_worker(settings: Mapping[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        settings: `job`, the `TrainJob`; `codes`, a reference to the SID codes [num_items, L].
    """
    import ray
    import ray.train

    job: TrainJob = settings["job"]
    set_threads(job.config.cpus_per_worker)
    loop = TrainLoop(job, ray.get(settings["codes"]), _report)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            loop.restore(Path(folder))
    loop.run()


def _report(row: dict[str, Any], folder: Path | None) -> None:
    import ray.train
    from ray.util import get_current_placement_group

    # Whoever stops this run from outside frees its resources by this: a killed controller cannot.
    group = get_current_placement_group()
    row = {**row, "placement_group": group.id.hex() if group else None}
    if folder is None:
        ray.train.report(row)
        return
    ray.train.report(
        row,
        checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
        # One name on all ranks: Ray merges their folders.
        checkpoint_dir_name=f"step_{row['global_step']:08d}",
    )
