"""Validation of checkpoints while training goes on, in a process of its own.

One validation is in flight at a time; training asks for its result when it is there, and waits for
it at the next validation point at the latest. The process reads the weights from the checkpoint,
so it can be started again at any time, and it keeps those of a new best in the run's folder.
Without such a process (none wanted, none started yet, lost) rank 0 computes the same numbers. An
error inside it is raised where the result is taken up, and nobody computes in its place: what was
too much for it would be too much beside a training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from safetensors.torch import load_file

from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset, SequenceBatch
from forge_ray.errors import ConfigError
from forge_ray.gr.checkpoint import WEIGHTS_FILE, build_generator
from forge_ray.gr.config import ValidationConfig
from forge_ray.gr.evaluation import evaluate_generator
from forge_ray.gr.health import SELECTION_METRIC, VALIDATION_WARNING
from forge_ray.gr.loop import TrainJob
from forge_ray.gr.run_folder import BEST, CHECKPOINTS, checkpoint_name
from forge_ray.sid.table import SidTable
from forge_ray.threads import set_threads

logger = logging.getLogger(__name__)


class CheckpointValidator:
    """Item-level metrics of a checkpoint on the sampled users, computed where it is called."""

    def __init__(
        self, job: TrainJob, codes: NDArray[np.unsignedinteger[Any]], *, device: str
    ) -> None:
        """Keeps the sample of users.

        Args:
            job: the run.
            codes: [num_items, L].
            device: torch device that decodes.
        """
        self._job = job
        self._device = device
        self._table = SidTable(codes, job.codebook_sizes, resolver="", key=job.identity.table_key)
        self._sample: Sample | None = None

    def run(self, step: int, best: float) -> dict[str, Any]:
        """Decodes the users with the checkpoint of a step.

        Args:
            step: of the checkpoint.
            best: highest ItemNDCG@10 so far; weights above it are kept.

        Returns:
            The metrics, the seconds that they took, and a `VALIDATION_WARNING` where all are 0
            because of how they are counted.
        """
        began = time.perf_counter()
        job, config, name = self._job, self._job.config, checkpoint_name(step)
        if self._sample is None:
            self._sample = _sample(job)
        generator = build_generator(config.model, self._table)
        with job.folder.local(CHECKPOINTS, name, WEIGHTS_FILE) as path:
            generator.load_state_dict(load_file(str(path)))
        metrics: dict[str, Any] = evaluate_generator(
            generator.eval().to(self._device),
            self._table,
            self._sample.histories,
            self._sample.targets,
            queries=self._sample.queries,
            text=None if job.text is None else job.text.text,
            prompts=config.tasks.prompts,
            train_counts=job.dataset.train_counts(),
            max_history=config.max_history,
            ks=config.validation.ks,
            widths=config.validation.widths or None,
            exclude_seen=config.validation.exclude_seen,
            batch_users=config.validation.batch_users,
            device=self._device,
        )
        if metrics[SELECTION_METRIC] > best:
            job.folder.copy((CHECKPOINTS, name, WEIGHTS_FILE), (BEST, f"{name}.safetensors"))
        warning = _nothing_found(metrics, self._sample, config.validation)
        if warning:
            metrics[VALIDATION_WARNING] = warning
        return {**metrics, "validation_s": round(time.perf_counter() - began, 2)}


class InlineValidation:
    """Validation by the training process itself, while it and all others wait."""

    def __init__(self, validator: CheckpointValidator) -> None:
        self._validator = validator
        self._found: dict[str, Any] | Exception = {}

    def submit(self, step: int, best: float) -> None:
        """Computes the metrics of a checkpoint."""
        try:
            self._found = self._validator.run(step, best)
        except Exception as error:  # noqa: BLE001  (raised where the metrics are taken up)
            # Its frames hold what there was no room for.
            self._found = error.with_traceback(None)

    def is_ready(self) -> bool:
        """Whether `result` returns at once."""
        return True

    def result(self) -> dict[str, Any]:
        """The metrics of the checkpoint that was submitted last."""
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


class _ValidationProcess:
    """The actor: a validator with threads of its own."""

    def __init__(self, job: TrainJob, codes: NDArray[np.unsignedinteger[Any]], device: str) -> None:
        set_threads(job.config.validation.cpus)
        self._validator = CheckpointValidator(job, codes, device=device)

    def is_up(self) -> bool:
        """Answers once the process has started."""
        return True

    def run(self, step: int, best: float) -> dict[str, Any]:
        """See `CheckpointValidator.run`."""
        return self._validator.run(step, best)


class AsideValidation:
    """Validation in a process of its own, for as long as there is one."""

    def __init__(self, job: TrainJob, codes: Any, fallback: CheckpointValidator) -> None:
        """Starts the process; it comes up while training begins.

        Args:
            job: the run.
            codes: reference to the codes in the object store.
            fallback: computes what the process cannot.
        """
        config = job.config.validation
        process = ray.remote(_ValidationProcess).options(
            num_cpus=config.cpus,
            num_gpus=config.gpus,
            # By default it would have to fit the placement group of the training workers.
            scheduling_strategy="SPREAD",
        )
        device = "cuda" if config.gpus else "cpu"
        self._process: Any = process.remote(job, codes, device)
        self._up = self._process.is_up.remote()
        self._fallback = fallback
        self._asked = (0, 0.0)
        self._answer: Any = None

    def submit(self, step: int, best: float) -> None:
        """Asks for the metrics of a checkpoint."""
        self._asked = (step, best)
        self._answer = self._process.run.remote(step, best) if self._process else None

    def is_ready(self) -> bool:
        """Whether `result` returns at once."""
        return self._answer is not None and _is_done(self._answer)

    def result(self) -> dict[str, Any]:
        """The metrics of the checkpoint that was submitted last."""
        if self._answer is None:
            return self._fallback.run(*self._asked)
        if not _is_done(self._up):
            logger.info("the validation process has not started yet; rank 0 validates")
            ray.cancel(self._answer)
            return self._fallback.run(*self._asked)
        try:
            metrics: dict[str, Any] = ray.get(self._answer)
        except ray.exceptions.RayActorError as error:
            logger.warning("the validation process was lost (%s); rank 0 validates", error)
            self._process = None
            return self._fallback.run(*self._asked)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        return metrics


def _is_done(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])


@dataclass(frozen=True)
class Sample:
    """Validation rows.

    Attributes:
        histories: U rows of item indices.
        targets: U rows of held-out items.
        queries: U texts; None where the task is the next item.
    """

    histories: Ragged
    targets: Ragged
    queries: list[str] | None = None

    def num_seen(self) -> int:
        """Rows with a target that stands in their history."""
        items = 1 + max(int(one.values.max(initial=0)) for one in (self.histories, self.targets))
        history, target = (
            one.row_ids * items + one.values for one in (self.histories, self.targets)
        )
        return len(np.unique(self.targets.row_ids[np.isin(target, history)]))


def _sample(job: TrainJob) -> Sample:
    config = job.config
    if config.tasks.validate == "next_item":
        return validation_sample(job.dataset, config.validation.users)
    assert job.text is not None  # the configuration asked for queries
    assert job.text.queries is not None
    return sampled(job.text.queries.batches("validation", limit=config.validation.users))


def validation_sample(dataset: Dataset, limit: int) -> Sample:
    """Histories and targets of the first `limit` validation users, a fixed random sample.

    Raises:
        ConfigError: The dataset has no validation users.
    """
    return sampled(dataset.sequence_batches("validation", limit=limit))


def sampled(batches: Iterable[SequenceBatch]) -> Sample:
    """All rows of some batches of a held-out split.

    Raises:
        ConfigError: there is none.
    """
    found = list(batches)
    targets = [batch.targets for batch in found if batch.targets is not None]
    if not targets:
        raise ConfigError(
            "dataset must have validation users, got none. Prepare it with a split that leaves "
            "some."
        )
    queries = [text for batch in found for text in batch.queries or ()]
    return Sample(
        Ragged.concatenate([batch.items for batch in found]),
        Ragged.concatenate(targets),
        queries or None,
    )


def _nothing_found(metrics: Mapping[str, Any], sample: Sample, config: ValidationConfig) -> str:
    """What to say of figures that are all 0 while targets could not be found; mostly nothing."""
    longest = max(config.ks)
    if not config.exclude_seen or metrics[f"ItemHit@{longest}"] > 0:
        return ""
    seen = sample.num_seen()
    if not seen:
        return ""
    return (
        f"validation finds no target of {len(sample.histories)} rows among {longest} items, and "
        f"{seen} of them ask for an item of their history, which is kept out of the lists. Where "
        "users come back to items, set validation.exclude_seen=false: otherwise neither the best "
        "checkpoint nor stop.patience says anything."
    )
