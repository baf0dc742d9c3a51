"""Training of an RQ-VAE: here, or by Ray Train on several workers; either continues after a kill.

Both run the same loop over the same global batches, so the number of workers changes a result by
rounding alone. A run is known by its folder, which belongs to one content: whatever a killed run
left there is continued.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyarrow.fs import FileSystem, LocalFileSystem

from forge_ray.errors import ForgeError, TrainingError, worker_error
from forge_ray.placement import label_selector
from forge_ray.sid.config import TrainConfig
from forge_ray.sid.quantizers.base import Report, TrainingSet, ignore_report
from forge_ray.sid.quantizers.rq_vae import DataFacts, RqVae, RqVaeConfig, data_facts
from forge_ray.sid.quantizers.rq_vae_batches import BatchPlan, check_workers
from forge_ray.sid.quantizers.rq_vae_run import Kept, Run, RunHooks, Select
from forge_ray.sid.quantizers.rq_vae_training import State
from forge_ray.sid.quantizers.workers import Workers
from forge_ray.sid.train_data import BatchStream, StagedSet, stage
from forge_ray.threads import set_threads

if TYPE_CHECKING:
    import ray.train

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
_RUN = "run"
_START_TIMEOUT_S = 900
_CONTROLLER_RETRIES = 4
"""Attempts, of `_START_TIMEOUT_S` each, to start the workers before a run gives up."""


def train_rq_vae(
    config: RqVaeConfig,
    data: TrainingSet,
    *,
    seed: int,
    spread: TrainConfig,
    filesystem: FileSystem,
    folder: str,
    select: Select | None = None,
    report: Report = ignore_report,
) -> RqVae:
    """Train, or continue what a killed call left in the folder.

    Args:
        config: of the quantizer.
        data: what it is trained on; with workers, its arrays are best mapped from files.
        seed: of weights, batches and draws.
        spread: workers, and how often the state is saved.
        filesystem: of the folder; with workers on several nodes, one that all of them reach.
        folder: of this configuration, seed and data alone; the caller removes it afterwards.
        select: measures a model on held-out behaviour; picklable when there are workers.
        report: called with a step and its metrics; with workers, after the training.

    Returns:
        The fitted quantizer, on the CPU.

    Raises:
        ConfigError: when workers do not divide the batches.
        DataError: when vectors, pairs or teachers are missing or not finite.
        TrainingError: when a loss is not finite, or workers are lost too often.
    """
    model = config.build(data.vectors.shape[1], seed=seed)
    if spread.workers:
        return _train_on_ray(model, data, spread, filesystem, folder, select, report)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    states = StateFile(filesystem, f"{folder}/{STATE_FILE}")
    hooks = RunHooks(report, select, states.save, spread.checkpoint_every)
    model.train(data, hooks, states.load())
    model.to("cpu")
    return model


@dataclass(frozen=True)
class StateFile:
    """The saved state of a run in this process: one file, replaced as a whole."""

    filesystem: FileSystem
    path: str

    def save(self, state: State) -> None:
        """Write the state; a reader sees the old one or the new one."""
        self.filesystem.create_dir(self.path.rsplit("/", 1)[0], recursive=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        partial = f"{self.path}.partial"
        with self.filesystem.open_output_stream(partial) as sink:
            sink.write(buffer.getbuffer())
        self.filesystem.move(partial, self.path)

    def load(self) -> State | None:
        """Read the state, if there is one."""
        if not self.filesystem.get_file_info(self.path).is_file:
            return None
        with self.filesystem.open_input_stream(self.path) as source:
            state = _load_state(source.read())
        logger.info("training continues at step %d", state["trainer"]["step"])
        return state


def _load_state(content: bytes) -> State:
    state: State = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


@dataclass(frozen=True)
class _Job:
    """What every worker gets."""

    config: RqVaeConfig
    input_dim: int
    seed: int
    scale: float
    plan: BatchPlan
    staged: StagedSet
    spread: TrainConfig
    select: Select | None


def _train_on_ray(
    model: RqVae,
    data: TrainingSet,
    spread: TrainConfig,
    filesystem: FileSystem,
    folder: str,
    select: Select | None,
    report: Report,
) -> RqVae:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig

    from forge_ray.trainer import ForgeTrainer

    model.prepare(data)
    plan = model.plan(data)
    check_workers(plan, spread.workers)
    staged = stage(data, filesystem, f"{folder}/data")
    job = _Job(model.config, model.input_dim, model.seed, model.scale, plan, staged, spread, select)
    shared = {"facts": data_facts(model.config, data), "start": model.start_rows(data)}
    trainer = ForgeTrainer(
        train_worker,
        train_loop_config={"job": job, "shared": ray.put(shared)},
        torch_config=TorchConfig(backend="nccl" if spread.gpus_per_worker else "gloo"),
        scaling_config=_scaling(spread),
        run_config=_run_config(spread, filesystem, folder),
    )
    # A worker that imports torch on a busy machine, or boots its node first, needs more than Ray's
    # 60 seconds; too short a wait starts all over again, for ever.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    if result.checkpoint is None:
        raise TrainingError(
            f"training in {folder} must leave a checkpoint, got none. Run it again."
        )
    with result.checkpoint.as_directory() as local:
        state = _load_state(Path(local, STATE_FILE).read_bytes())
    for step, metrics in state["curve"]:
        report(step, metrics)
    model.keep(Kept(**state["kept"]))
    return model


def _scaling(spread: TrainConfig) -> ray.train.ScalingConfig:
    import ray.train

    gpus = {"GPU": spread.gpus_per_worker} if spread.gpus_per_worker else {}
    return ray.train.ScalingConfig(
        num_workers=spread.workers,
        use_gpu=bool(spread.gpus_per_worker),
        resources_per_worker={"CPU": spread.cpus_per_worker, **gpus},
        label_selector=label_selector() or None,
    )


def _run_config(spread: TrainConfig, filesystem: FileSystem, folder: str) -> ray.train.RunConfig:
    import ray.train

    is_local = isinstance(filesystem, LocalFileSystem)
    return ray.train.RunConfig(
        # The same name in the same folder continues from the newest checkpoint.
        name=_RUN,
        storage_path=folder,
        storage_filesystem=None if is_local else filesystem,
        failure_config=ray.train.FailureConfig(
            max_failures=spread.max_failures, controller_failure_limit=_CONTROLLER_RETRIES
        ),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
    )


def _cause(error: Exception) -> ForgeError:
    return worker_error(
        error,
        "quantizer training must keep its workers",
        "The same command continues it from the last checkpoint; --verbose shows the workers' log.",
    )


def train_worker(settings: Mapping[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        settings: `job`, the `_Job`; `shared`, a reference to the facts of the data and the vectors
            that codebooks start from.
    """
    import ray
    import ray.train
    import ray.train.torch

    job: _Job = settings["job"]
    set_threads(job.spread.cpus_per_worker)
    workers = Workers.current()
    model = job.config.build(job.input_dim, seed=job.seed)
    model.scale = job.scale
    model.to(ray.train.torch.get_device() if job.spread.gpus_per_worker else "cpu")
    shared = ray.get(settings["shared"])
    facts: DataFacts = shared["facts"]
    hooks = RunHooks(_tell, job.select, _save, job.spread.checkpoint_every)
    run = Run(model.trainer(job.plan.total, facts, workers), hooks)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        run.trainer.start(shared["start"].copy())
    else:
        with checkpoint.as_directory() as folder:
            run.restore(_load_state(Path(folder, STATE_FILE).read_bytes()))
    stream = BatchStream(job.staged, job.plan, job.spread, workers.rank, workers.size)
    run.finish(stream.batches(run.trainer.step))


def _tell(step: int, metrics: Mapping[str, float]) -> None:
    import ray.train

    if ray.train.get_context().get_world_rank() == 0:
        logger.info("step %d: %s", step, {name: round(v, 4) for name, v in metrics.items()})


def _save(state: State) -> None:
    """Hand a checkpoint to Ray Train; the state is the same on all workers, so one writes it."""
    import ray.train

    step = state["trainer"]["step"]
    if ray.train.get_context().get_world_rank():
        ray.train.report({"step": step})
        return
    folder = Path(tempfile.mkdtemp(prefix="forge-ray-rq-vae-"))
    try:
        torch.save(state, folder / STATE_FILE)
        checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        metrics = {"step": step, **dict(state["curve"][-1][1] if state["curve"] else {})}
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step_{step:08d}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
