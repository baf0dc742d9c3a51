"""Training of one generator by Ray Train: driver side and worker side.

The driver starts a `TorchTrainer`, from a plain process or from inside a Tune trial. Every worker
streams the same global batches, takes its share, and writes its own shard of each checkpoint. A run
is known by its name: the same name continues after a crash of a worker (by itself) or of the driver
(by the same call), and a changed configuration is refused.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from forge_ray.artifacts import (
    Artifact,
    ArtifactInfo,
    ArtifactStore,
    ArtifactWriter,
    open_filesystem,
)
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError, ForgeError, StoppedError, TrainingError, worker_error
from forge_ray.gr.checkpoint import (
    HISTORY_FILE,
    LOSSES_FILE,
    MODEL_KIND,
    TASK_TEXT_FILE,
    WEIGHTS_FILE,
    RunIdentity,
    config_hash,
    table_key,
)
from forge_ray.gr.config import GrConfig
from forge_ray.gr.health import best_row, is_measured
from forge_ray.gr.initial import resolved_initial, write_initial
from forge_ray.gr.loop import PREEMPTED, UNVALIDATED, LoopHooks, TrainJob, TrainLoop, Validation
from forge_ray.gr.meters import TrainMeters
from forge_ray.gr.mixture import TextData
from forge_ray.gr.models.pretrained import PretrainedConfig
from forge_ray.gr.run_folder import (
    BEST,
    CHECKPOINTS,
    OUTCOME_FILE,
    STOP_FILE,
    RunFolder,
    checkpoint_name,
)
from forge_ray.gr.tasks import CATALOGUE_TASKS
from forge_ray.sid.table import SidTable
from forge_ray.threads import set_threads

if TYPE_CHECKING:
    import ray
    import ray.train

logger = logging.getLogger(__name__)

RUN_FILE = "forge-run.json"
_START_TIMEOUT_ENV = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_START_LIMIT_S = 3600
"""Seconds that a run waits for its workers' resources, over all attempts, before it gives up."""
_POLL_S = 2.0
"""Seconds between two looks at the stop file and at notices of preemption."""


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        artifact: the published model, of kind `model`.
        metrics: the row of the validation that its weights had.
        history: one row per validation that came to its end, oldest first; the artifact's file has
            those that failed too.
        losses: float64 [steps], mean loss per target token of every step's global batch.
    """

    artifact: Artifact
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    losses: NDArray[np.float64]


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
    group: str = "",
) -> TrainResult:
    """Trains a generator, or returns the model if this content was trained before.

    Args:
        config: of the run.
        dataset: its train part is streamed, its validation part sampled.
        table: SIDs of the dataset's items.
        store: where the model is published.
        run_dir: absolute path or URI that all nodes share; see `gr/run_folder.py`.
        name: of the run and the model; the same name resumes.
        callbacks: told of every report, and again of those before a checkpoint that is resumed
            from (without a context); not where the model was there already.
        command: shell command that repeats the run, for the manifest.
        group: what the counters of several runs have in common, their sweep's name.

    Raises:
        ConfigError: The name belongs to a run with another configuration.
        TrainingError: The loss diverged, workers were lost too often, or validations failed.
        StoppedError: SIGTERM or a file `stop` asked for the end; the same call continues.
    """
    config = _resolved(config, dataset, table, store)
    content = _content(config, table)
    identity = _run_identity(config, dataset, content)

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        folder = _claim_run(RunFolder.open(run_dir, name), identity)
        write_initial(folder, config, store, dataset, table)
        job = TrainJob(
            config=config,
            dataset=dataset,
            codebook_sizes=table.codebook_sizes,
            identity=identity,
            folder=folder,
            started=time.time(),
            group=group,
            text=_text_data(config, dataset, store),
        )
        outcome = _fit(job, table, run_dir=run_dir, name=name, callbacks=callbacks)
        _check_outcome(outcome, job, name=name, command=command)
        return _publish(writer, job, outcome)

    artifact = store.build(
        MODEL_KIND,
        name.replace("/", "-"),
        content,
        parents=[one for one in _parents(config, dataset, table) if one],
        produce=produce,
        command=command,
    )
    return train_result(artifact)


def _content(config: GrConfig, table: SidTable) -> dict[str, Any]:
    """What decides the model beside its dataset."""
    content: dict[str, Any] = {"gr": config.identity(), "table_key": table_key(table)}
    # Queries alone once chose the weights as if histories had stood beside them.
    return content | config.tasks.prompts.identity(has_queries=config.tasks.validate == "search")


def _parents(config: GrConfig, dataset: Dataset, table: SidTable) -> tuple[str, ...]:
    queries = config.tasks.queries if config.tasks.needs_queries else ""
    return dataset.key, table_key(table), config.initial.model, queries


def _resolved(
    config: GrConfig, dataset: Dataset, table: SidTable, store: ArtifactStore
) -> GrConfig:
    """The configuration with what it names looked up."""
    _check_table(config, dataset, table)
    config.model.check_history(config.max_history)
    config.check_targets()
    config.tasks.check_validation()
    _check_validation(config, dataset)
    initial = resolved_initial(config.initial, store, table, config.model)
    tasks = config.tasks
    if tasks.needs_queries:
        tasks = replace(tasks, queries=QuerySet.open(store, tasks.queries).key)
    return replace(config, model=config.model.resolved(), initial=initial, tasks=tasks)


def _text_data(config: GrConfig, dataset: Dataset, store: ArtifactStore) -> TextData | None:
    """What the tasks with text read, checked.

    Raises:
        ConfigError: the queries belong to another dataset, or the items have no such column.
    """
    tasks = config.tasks
    if not tasks.text_tasks:
        return None
    assert isinstance(config.model, PretrainedConfig)  # the configuration lets no other read text
    queries = None
    if tasks.needs_queries:
        queries = QuerySet.open(store, tasks.queries)
        queries.check_dataset(dataset)
    columns = dataset.item_columns()
    if any(task in CATALOGUE_TASKS for task in tasks.text_tasks) and tasks.column not in columns:
        raise ConfigError(
            f"tasks.column must be a column of the items of {dataset.name}, got {tasks.column!r}. "
            f"There are {', '.join(columns)}."
        )
    return TextData(config.model.task_text(tasks), queries)


def _check_table(config: GrConfig, dataset: Dataset, table: SidTable) -> None:
    """Refuses a table of other items or levels than the data and the configuration speak of."""
    if table.num_items != dataset.num_items:
        raise ConfigError(
            f"the SID table must cover the dataset's {dataset.num_items} items, got "
            f"{table.num_items}. Fit semantic IDs on this dataset."
        )
    config.check_levels(table.num_levels)


def _check_validation(config: GrConfig, dataset: Dataset) -> None:
    """Refuses a dataset on which the first validation would fail, however late that is."""
    rows = dataset.artifact.manifest.rows
    if config.tasks.validate == "next_item" and rows.get("validation_users") == 0:
        raise ConfigError(
            f"{dataset.name} must have validation users, got none. Prepare it with a split that "
            "leaves some."
        )


def _run_identity(config: GrConfig, dataset: Dataset, content: dict[str, Any]) -> RunIdentity:
    return RunIdentity(
        config_hash=config_hash({**content, "dataset": dataset.key}),
        table_key=content["table_key"],
        dataset_key=dataset.key,
        zero_stage=config.engine.zero_stage,
        precision=config.engine.precision,
    )


def train_result(artifact: Artifact) -> TrainResult:
    """The result that belongs to a published model."""
    history = json.loads(artifact.local(HISTORY_FILE).read_text(encoding="utf-8"))
    losses = np.load(artifact.local(LOSSES_FILE))
    measured = [row for row in history if is_measured(row)]
    return TrainResult(artifact, dict(artifact.manifest.metrics), measured, losses)


def _claim_run(folder: RunFolder, identity: RunIdentity) -> RunFolder:
    """Writes who owns the run folder, or checks it; forgets how an earlier attempt ended."""
    owner = folder.read_json(RUN_FILE)
    if owner is not None and owner["config_hash"] != identity.config_hash:
        raise ConfigError(
            f"{folder.uri}/{RUN_FILE} must belong to this configuration "
            f"({identity.config_hash[:12]}), got {owner['config_hash'][:12]}. Choose another name, "
            "or remove that folder to start afresh."
        )
    folder.delete(OUTCOME_FILE)
    folder.delete(STOP_FILE)
    folder.write_json({"config_hash": identity.config_hash}, RUN_FILE)
    return folder


def _fit(
    job: TrainJob,
    table: SidTable,
    *,
    run_dir: str,
    name: str,
    callbacks: Sequence[ray.train.UserCallback],
) -> dict[str, Any]:
    """Trains to an end that is not a lost node's; what was written about it."""
    for doubt in job.config.doubts():
        logger.warning(doubt)
    # The workers look for themselves; here it is said where a user sees it.
    found = job.folder.newest_checkpoint(job.identity)
    for warning in found.warnings:
        logger.warning(warning)
    if callbacks:
        from forge_ray.gr.telling import tell_again

        tell_again(found, callbacks)
    if job.config.in_process:
        start = _here(table, callbacks)
    else:
        run = _run_config(job.config, run_dir=run_dir, name=name)
        start = _on_workers(table, run, callbacks)
    warned = set(found.warnings)
    while True:
        outcome = _attempt(job, start, name)
        for warning in outcome["warnings"]:
            # A training in this process has said it already.
            if warning not in warned and not job.config.in_process:
                logger.warning(warning)
        warned.update(outcome["warnings"])
        if outcome["kind"] != PREEMPTED:
            return outcome
        # Ray Train would wait for the node's end, and its workers would train on in vain. No worker
        # is placed on a node that goes.
        logger.warning(
            "run %r: a node goes; saved at step %d, going on elsewhere", name, outcome["step"]
        )
        job.folder.delete(OUTCOME_FILE)
        job = replace(job, started=time.time())


def _attempt(job: TrainJob, start: Callable[[TrainJob], None], name: str) -> dict[str, Any]:
    """Starts the training; what was written about its end."""
    with _stopping_on_sigterm(job.folder):
        start(job)
    outcome: dict[str, Any] | None = job.folder.read_json(OUTCOME_FILE)
    if outcome is None:
        raise TrainingError(
            f"run {name!r} must come to an end, got none (was it interrupted?). The same command "
            "resumes it from the last checkpoint."
        )
    return outcome


def _here(
    table: SidTable, callbacks: Sequence[ray.train.UserCallback]
) -> Callable[[TrainJob], None]:
    """Trains in this process."""
    from forge_ray.gr.train_here import train_here

    codes = np.asarray(table.codes)

    def report(row: dict[str, Any]) -> None:
        for callback in callbacks:
            callback.after_report(cast(Any, None), [row], None)

    def start(job: TrainJob) -> None:
        train_here(job, codes, report=report, poll=_Poll(job.folder), count=TrainMeters(job.group))

    return start


def _on_workers(
    table: SidTable, run: ray.train.RunConfig, callbacks: Sequence[ray.train.UserCallback]
) -> Callable[[TrainJob], None]:
    """Starts workers, and again where they are lost."""
    import ray
    import ray.train

    from forge_ray.trainer import ForgeTrainer, torch_config

    # The codes lie in the object store once; every worker of a node reads them in place.
    codes = ray.put(np.asarray(table.codes))

    def start(job: TrainJob) -> None:
        config = job.config
        watched = replace(run, callbacks=_telling(job, callbacks)) if callbacks else run
        trainer = ForgeTrainer(
            train_worker,
            train_loop_config={"job": job, "codes": codes},
            torch_config=torch_config(use_gpu=config.use_gpu),
            scaling_config=_scaling(config),
            run_config=watched,
        )
        try:
            with _waiting_for_resources(_attempt_s(config)):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error, str(run.name)) from error

    return start


def _telling(
    job: TrainJob, callbacks: Sequence[ray.train.UserCallback]
) -> list[ray.train.UserCallback]:
    """Tells the callbacks, from the checkpoint on that workers start from now."""
    from forge_ray.gr.telling import Telling

    return [Telling(job.folder, callbacks, job.folder.newest_checkpoint(job.identity))]


def _attempt_s(config: GrConfig) -> int:
    """Seconds that one attempt to start the workers waits for their resources.

    A fixed number of workers may have to wait for nodes that boot. An elastic one takes what is
    there, and what Ray counts as there is up to 20 seconds old: where a node has just gone, the
    sooner it counts again the better.
    """
    return 30 if config.max_workers > config.num_workers else 900


@contextmanager
def _waiting_for_resources(seconds: int) -> Iterator[None]:
    """Sets how long Ray Train waits, unless the user has; it reads the environment only."""
    is_ours = _START_TIMEOUT_ENV not in os.environ
    if is_ours:
        os.environ[_START_TIMEOUT_ENV] = str(seconds)
    try:
        yield
    finally:
        if is_ours:
            os.environ.pop(_START_TIMEOUT_ENV, None)


@contextmanager
def _stopping_on_sigterm(folder: RunFolder) -> Iterator[None]:
    """Turns SIGTERM into a request to save and end; signals reach a main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        logger.warning("SIGTERM: training saves a checkpoint and ends")
        folder.write_json({"signal": signum}, STOP_FILE)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_outcome(outcome: dict[str, Any], job: TrainJob, *, name: str, command: str) -> None:
    """Raises for a training that did not come to its end."""
    if outcome["kind"] in ("finished", "settled"):
        return
    found = job.folder.newest_checkpoint(job.identity).name
    last = f"{job.folder.uri}/{CHECKPOINTS}/{found}" if found else "none was written yet"
    if outcome["kind"] == "stopped":
        raise StoppedError(
            f"run {name!r} must reach its end, got {outcome['reason']} at step {outcome['step']}. "
            f"The same command continues it from {last}."
        )
    if outcome["kind"] == UNVALIDATED:
        raise TrainingError(
            f"run {name!r} must be validated, got {outcome['reason']}. Nothing is lost: the same "
            f"command validates {last} and goes on from it, with another validation.batch_users, "
            "validation.gpus or validation.aside if you like."
        )
    again = command or f"forge-ray gr train … --name {name}"
    raise TrainingError(
        f"run {name!r} must keep a falling, finite loss, got {outcome['reason']}. The last good "
        f"checkpoint is intact: {last}. Lower engine.learning_rate (and use another --name) in: "
        f"{again}"
    )


def _scaling(config: GrConfig) -> ray.train.ScalingConfig:
    import ray.train

    gpus = {"GPU": 1} if config.use_gpu else {}
    return ray.train.ScalingConfig(
        num_workers=(config.num_workers, config.max_workers)
        if config.max_workers > config.num_workers
        else config.num_workers,
        use_gpu=config.use_gpu,
        resources_per_worker={"CPU": config.cpus_per_worker, **gpus, **config.worker_resources},
        label_selector=dict(config.worker_labels) or None,
    )


def _run_config(config: GrConfig, *, run_dir: str, name: str) -> ray.train.RunConfig:
    import ray.train

    filesystem, root = open_filesystem(run_dir)
    return ray.train.RunConfig(
        name=name,
        storage_path=root,
        storage_filesystem=filesystem if "://" in run_dir else None,
        failure_config=ray.train.FailureConfig(
            max_failures=config.max_failures,
            controller_failure_limit=_START_LIMIT_S // _attempt_s(config),
        ),
    )


def _publish(writer: ArtifactWriter, job: TrainJob, outcome: dict[str, Any]) -> ArtifactInfo:
    """Copies the chosen weights into the artifact; DeepSpeed's shards stay behind."""
    is_last = job.config.published == "last"
    history = job.folder.read_json(HISTORY_FILE)
    chosen = history[-1 if is_last else best_row(history)]
    name = checkpoint_name(chosen["global_step"])
    place = (CHECKPOINTS, name, WEIGHTS_FILE) if is_last else (BEST, f"{name}.safetensors")
    with job.folder.local(*place) as weights, writer.local_path(WEIGHTS_FILE) as target:
        shutil.copyfile(weights, target)
    with writer.open(HISTORY_FILE) as sink:
        sink.write(json.dumps(history).encode())
    with writer.local_path(LOSSES_FILE) as target:
        np.save(target, np.array(outcome["losses"]))
    if job.text is not None:
        with writer.open(TASK_TEXT_FILE) as sink:
            sink.write(job.text.text.to_json().encode())
    return ArtifactInfo(rows={"steps": outcome["step"]}, metrics=chosen)


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
    loop = TrainLoop(job, ray.get(settings["codes"]), _hooks(job, settings["codes"]))
    loop.restore()
    loop.run()


def _hooks(job: TrainJob, codes: Any) -> LoopHooks:
    import ray.train

    is_first = ray.train.get_context().get_world_rank() == 0
    return LoopHooks(
        report=_Reporter(),
        validation=_validation(job, codes) if is_first else None,
        poll=_Poll(job.folder),
        is_preempted=_Preemption(),
        count=TrainMeters(job.group) if is_first else _count_nothing,
    )


def _count_nothing(amounts: Mapping[str, float]) -> None:
    """Of the other ranks: the first one's counters speak for the run."""


def _validation(job: TrainJob, codes: Any) -> Validation:
    import ray

    from forge_ray.gr.validation import AsideValidation, CheckpointValidator, InlineValidation

    device = "cuda" if job.config.use_gpu else "cpu"
    here = CheckpointValidator(job, ray.get(codes), device=device)
    return (
        AsideValidation(job, codes, here) if job.config.validation.aside else InlineValidation(here)
    )


class _Poll:
    """Rank 0's look outside, at most every `_POLL_S` seconds."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._next = 0.0

    def __call__(self) -> str:
        if time.monotonic() < self._next:
            return ""
        self._next = time.monotonic() + _POLL_S
        return "stop" if self._folder.exists(STOP_FILE) else "look"


class _Preemption:
    """Notices of preemption, each told once."""

    def __init__(self) -> None:
        self._told: Any = None

    def __call__(self) -> bool:
        import ray.train

        info = ray.train.get_preemption_info()
        is_new = info is not None and info != self._told
        self._told = info
        return is_new


class _Reporter:
    """Reports rows to Ray Train, with where and since when the worker runs."""

    def __init__(self) -> None:
        self._started = time.time()

    def __call__(self, row: dict[str, Any]) -> None:
        import ray.train
        from ray.util import get_current_placement_group

        # Whoever stops this run from outside frees its resources by the group: a killed controller
        # cannot.
        group = get_current_placement_group()
        ray.train.report(
            {
                **row,
                "placement_group": group.id.hex() if group else None,
                "node_labels": dict(ray.get_runtime_context().get_node_labels()),
                "workers_started": self._started,
            }
        )
