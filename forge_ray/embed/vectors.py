"""The vectors a quantizer reads: a space of the dataset, or one fused with behaviour.

Knows datasets and artifacts; both kinds of source are Parquet shards of the same schema, so whoever
reads them (here, or Ray Data) need not know which it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping
from forge_ray.data.schema import Dataset, VectorBatch, matrix, vectors_schema
from forge_ray.embed.behaviour import behaviour_vectors, cooccurrence, fuse
from forge_ray.errors import ConfigError

logger = logging.getLogger(__name__)

KIND = "vectors"
SHARD_ROWS = 262_144


@dataclass(kw_only=True)
class BehaviourConfig:
    """Train co-occurrence fused into the vectors."""

    alpha: float = 0.0
    """Weight of behaviour; 0 for none, 0.3 to 0.5 in the source."""
    dim: int = 256
    """Components of the co-occurrence SVD."""
    window: int = 3
    """Largest distance of two items in a train sequence that counts as co-occurrence."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.alpha < 0:
            raise ConfigError(
                f"vectors.behaviour.alpha must be >= 0, got {self.alpha}. Use 0 for none."
            )
        for name in ("dim", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"vectors.behaviour.{name} must be >= 1, got {getattr(self, name)}. Raise it."
                )


@dataclass(kw_only=True)
class VectorsConfig:
    """Which item vectors to quantize."""

    space: str = "default"
    """Name of a vector space of the dataset."""
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)

    def canonical(self) -> VectorsConfig:
        """The same vectors, unused fields at their defaults: equal inputs share keys."""
        return replace(self) if self.behaviour.alpha else VectorsConfig(space=self.space)


@dataclass(frozen=True)
class VectorSet:
    """Vectors of every item of a catalogue, in Parquet shards of unknown order."""

    key: str
    """Content key of the artifact that holds them."""
    filesystem: FileSystem
    files: tuple[str, ...]
    """Shards with columns `item_index` and `vector`."""
    num_items: int
    dim: int

    def batches(self, batch_size: int = 65_536) -> Iterator[VectorBatch]:
        """Stream the vectors in shard order, at most `batch_size` rows at a time."""
        for path in self.files:
            with self.filesystem.open_input_file(path) as handle:
                for batch in pq.ParquetFile(handle).iter_batches(batch_size):
                    yield VectorBatch(
                        batch.column("item_index").to_numpy().astype(np.int64),
                        matrix(batch.column("vector")),
                    )

    def take(self, items: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Load the vectors of some items by one pass over the shards.

        Args:
            items: distinct item indices [n], in any order.

        Returns:
            float32 [n, D] in the order of `items`; takes 4·n·D bytes and 8 bytes per item.
        """
        row = np.full(self.num_items, -1, dtype=np.int64)
        row[items] = np.arange(len(items))
        out = np.empty((len(items), self.dim), dtype=np.float32)
        for batch in self.batches():
            rows = row[batch.indices]
            wanted = rows >= 0
            out[rows[wanted]] = batch.vectors[wanted]
        return out


def open_vectors(config: VectorsConfig, dataset: Dataset, store: ArtifactStore) -> VectorSet:
    """Find, or build once, the vectors that a configuration names.

    Args:
        config: space and fusion.
        dataset: the prepared dataset.
        store: where fused vectors are kept as an artifact of kind `vectors`.

    Raises:
        DataError: when the dataset has no such space.
    """
    plain = VectorSet(
        key=dataset.key,
        filesystem=dataset.filesystem,
        files=tuple(dataset.vector_files(config.space)),
        num_items=dataset.num_items,
        dim=dataset.vector_dim(config.space),
    )
    if config.behaviour.alpha == 0:
        return plain
    artifact = store.build(
        KIND,
        f"{config.space}-fused",
        to_mapping(config),
        parents=(dataset.key,),
        produce=lambda writer: _write_fused(config, dataset, plain, writer),
        command=f"forge-ray sid fit {dataset.artifact.uri} "
        f"vectors.behaviour.alpha={config.behaviour.alpha}",
    )
    files = tuple(artifact.files("vectors"))
    return replace(plain, key=artifact.key, filesystem=artifact.filesystem, files=files)


def _write_fused(
    config: VectorsConfig, dataset: Dataset, plain: VectorSet, writer: ArtifactWriter
) -> ArtifactInfo:
    """Fuse in memory: 4·N·(2D + 2d) bytes beside the sparse counts; N up to some millions."""
    logger.info("fusing co-occurrence into the vectors of %s items", f"{plain.num_items:,}")
    sequences = (batch.items for batch in dataset.sequence_batches("train"))
    counts = cooccurrence(sequences, plain.num_items, window=config.behaviour.window)
    behaviour = behaviour_vectors(counts, config.behaviour.dim)
    vectors = plain.take(np.arange(plain.num_items))
    fused = fuse(vectors, behaviour, alpha=config.behaviour.alpha)
    schema = vectors_schema(plain.dim, "float32")
    for shard in range(math.ceil(plain.num_items / SHARD_ROWS)):
        rows = slice(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        flat = pa.array(fused[rows].reshape(-1), pa.float32())
        index = pa.array(np.arange(plain.num_items, dtype=np.int32)[rows])
        columns = [index, pa.FixedSizeListArray.from_arrays(flat, plain.dim)]
        with writer.open("vectors", f"part-{shard:05d}.parquet") as stream:
            pq.write_table(pa.Table.from_arrays(columns, schema=schema), stream)
    covered = float((np.diff(counts.indptr) > 0).mean())
    return ArtifactInfo(
        rows={"items": plain.num_items, "cooccurring_pairs": int(counts.nnz)},
        metrics={"items_with_neighbours": covered},
    )
