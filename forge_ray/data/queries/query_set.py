"""The query-set artifact: its columns, and the handle that training and evaluation read it through.

Every row of every split, train included, is a question: the history before it, its text, and the
one item that was wanted. Knows Parquet layouts; knows nothing about how queries were found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forge_ray.data.parts import plan_parts, read_part
from forge_ray.data.schema import HELD_OUT_SCHEMA, Dataset, SequenceBatch, Split
from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from forge_ray.artifacts import Artifact, ArtifactStore

QUERIES_KIND = "queries"
QUERY_SCHEMA = HELD_OUT_SCHEMA.append(pa.field("query", pa.string()))
_BATCH_ROWS = 65536


class QuerySet:
    """Read access to the queries on one dataset; picklable wherever the artifact is."""

    artifact: Artifact
    dataset: Dataset

    def __init__(self, artifact: Artifact, dataset: Dataset) -> None:
        if artifact.manifest.kind != QUERIES_KIND:
            raise ConfigError(
                f"queries must be an artifact of kind {QUERIES_KIND!r}, got kind "
                f"{artifact.manifest.kind!r} at {artifact.uri}. Run `forge-ray data queries`."
            )
        self.artifact = artifact
        self.dataset = dataset

    @classmethod
    def open(cls, store: ArtifactStore, ref: str) -> QuerySet:
        """Open by artifact directory, `queries/name-key12`, unique name or key prefix."""
        artifact = store.open(ref, kind=QUERIES_KIND)
        return cls(artifact, Dataset.open(store, artifact.manifest.parents[0]))

    @property
    def key(self) -> str:
        """The content key; the dataset's key is part of it."""
        return self.artifact.key

    @property
    def name(self) -> str:
        """The name given when it was made."""
        return self.artifact.manifest.name

    @property
    def is_synthetic(self) -> bool:
        """Whether the queries were made from the items' texts, and nobody asked them."""
        return bool(self.artifact.manifest.metrics["synthetic"])

    @property
    def filesystem(self) -> FileSystem:
        """The filesystem of `sequence_files`."""
        return self.artifact.filesystem

    def train_counts(self) -> NDArray[np.int64]:
        """Train interactions of every item, ``[N]`` int64: those of the dataset."""
        return self.dataset.train_counts()

    def sequence_files(self, split: Split) -> list[str]:
        """Shard paths of a split, columns as in `QUERY_SCHEMA`."""
        return self.artifact.files(f"sequences/{split}/")

    def batches(self, split: Split, *, limit: int | None = None) -> Iterator[SequenceBatch]:
        """Stream the rows of a split; those of the first users, a random sample, with a limit."""
        for part in plan_parts(self, split, rows_per_part=_BATCH_ROWS, limit=limit):
            yield read_part(self, part)

    def check_dataset(self, dataset: Dataset) -> None:
        """Refuses to go with another dataset than the one the queries belong to.

        Raises:
            ConfigError: the keys differ.
        """
        if self.dataset.key != dataset.key:
            raise ConfigError(
                f"queries must belong to dataset {dataset.artifact.manifest.ref}, got "
                f"{self.artifact.manifest.ref} of {self.dataset.artifact.manifest.ref}. Make them "
                f"with `forge-ray data queries {dataset.artifact.manifest.ref}`."
            )
