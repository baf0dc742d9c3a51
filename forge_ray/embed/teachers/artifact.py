"""Teachers as artifacts: fitted once on the train part of a dataset, then opened.

The only module of this package that knows datasets and files.
"""

from __future__ import annotations

import logging
import time
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


@dataclass(frozen=True, eq=False)
class Teacher:
    """Frozen vectors of a behaviour model; memory-mapped where the store is a local disk."""

    key: str
    """Content key of the artifact; what is fitted with this teacher names it as parent."""
    items: FloatArray
    """float32 [N, t] in item order; zero rows for items without a train interaction."""
    users: FloatArray
    """float32 [U, t], one row for each user read."""
    user_index: Int64Array
    """int64 [U], the dataset's user of each row of `users`."""
    artifact: Artifact

    @property
    def is_known(self) -> npt.NDArray[np.bool_]:
        """Whether each item has a vector, bool [N]."""
        return np.asarray(self.items.any(axis=1))


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
        key=artifact.key,
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
    found = config.fit(log, report=lambda step, row: curve.append({"epoch": step, **row}))
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
