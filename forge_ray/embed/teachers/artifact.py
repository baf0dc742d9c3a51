"""Teachers as artifacts: fitted once on the train part of a dataset, then opened.

The only module of this package that knows datasets and files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.embed.teachers.base import FloatArray, Int64Array, TeacherConfig, TrainLog
from forge_ray.errors import DataError

logger = logging.getLogger(__name__)

KIND = "teacher"
_LOG_EVERY = 5
"""Epochs between two lines of progress."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """Frozen vectors of a behaviour model; memory-mapped where the store is a local disk."""

    items: FloatArray
    """float32 [N, t] in item order; zero rows for items without a train interaction."""
    users: FloatArray
    """float32 [U, t], one row for each user read."""
    user_index: Int64Array
    """int64 [U], the dataset's user of each row of `users`."""
    artifact: Artifact


def load_teacher(config: TeacherConfig, dataset: Dataset, store: ArtifactStore) -> Teacher:
    """Open the teacher of this configuration, fitting it if it is not in the store.

    Args:
        config: kind and its fields.
        dataset: only `sequences/train` is read.
        store: where the artifact of kind `teacher` is kept.

    Raises:
        DataError: the train part is empty.
        TrainingError: training diverged.
    """
    artifact = store.build(
        KIND,
        f"{dataset.name}-{config.kind}",
        to_mapping(config),
        parents=(dataset.key,),
        produce=lambda writer: _produce(config, dataset, writer),
    )
    return Teacher(
        items=_mapped(artifact, "items"),
        users=_mapped(artifact, "users"),
        user_index=_mapped(artifact, "user_index"),
        artifact=artifact,
    )


def train_log(dataset: Dataset, *, max_users: int) -> TrainLog:
    """Load train histories of at most `max_users` users, a random sample beyond it.

    Raises:
        DataError: there is no train interaction.
    """
    batches = list(dataset.sequence_batches("train", limit=max_users))
    num_interactions = sum(len(batch.items.values) for batch in batches)
    if not num_interactions:
        raise DataError(
            f"{dataset.name} must have train interactions to fit a teacher, got none. "
            "Check the split of `forge-ray data prepare`."
        )
    return TrainLog(
        np.concatenate([batch.user_index for batch in batches]),
        Ragged.concatenate([batch.items for batch in batches]),
        dataset.num_items,
    )


def _mapped(artifact: Artifact, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(artifact.local(f"{name}.npy"), mmap_mode="r")
    return array


def _produce(config: TeacherConfig, dataset: Dataset, writer: ArtifactWriter) -> ArtifactInfo:
    started = time.monotonic()
    logger.info("fitting teacher %s on the train part of %s", config.kind, dataset.name)
    log = train_log(dataset, max_users=config.max_users)
    curve: list[dict[str, float]] = []

    def record(epoch: int, figures: Mapping[str, float]) -> None:
        curve.append({"epoch": epoch, **figures})
        if epoch % _LOG_EVERY == 0:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            logger.info("teacher %s, epoch %d: %s", config.kind, epoch, shown)

    found = config.fit(log, report=record)
    arrays: dict[str, npt.NDArray[Any]] = {
        "items": found.items,
        "users": found.users,
        "user_index": log.user_index,
    }
    for name, array in arrays.items():
        with writer.open(f"{name}.npy") as stream:
            np.save(stream, array)
    seconds = round(time.monotonic() - started, 3)
    return ArtifactInfo(
        rows={"items": len(found.items), "users": len(found.users)},
        metrics={**found.metrics, "seconds_fit": seconds, "curve": curve},
    )
