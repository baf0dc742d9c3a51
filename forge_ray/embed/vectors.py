"""The vectors a quantizer reads: a space of the dataset or an encoder's, changed where asked for.

Knows datasets and artifacts; every source is Parquet shards of one schema, so whoever reads them
(here, or Ray Data) need not know which it is. The transforms themselves are in `transform.py`.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
from pyarrow.fs import FileSystem

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter, Manifest
from forge_ray.config import to_mapping, to_overrides
from forge_ray.data.schema import Dataset, VectorBatch, matrix, vectors_schema
from forge_ray.embed.adapter import AdapterConfig
from forge_ray.embed.behaviour import BehaviourConfig
from forge_ray.embed.counts import CountsConfig, WindowCountsConfig
from forge_ray.embed.graph_smooth import GraphSmoothConfig
from forge_ray.embed.side import read_side
from forge_ray.embed.transform import Transforms, transform
from forge_ray.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

KIND = "vectors"
SHARD_ROWS = 262_144


@dataclass(kw_only=True)
class VectorsConfig:
    """Which item vectors to quantize, and what changes them before: smooth, adapt, fuse."""

    space: str = "default"
    """A vector space of the dataset, or an artifact of kind `vectors` made from it (name, reference
    or key)."""
    counts: CountsConfig = field(default_factory=WindowCountsConfig)
    """The train co-occurrence that all three read."""
    smooth: GraphSmoothConfig = field(default_factory=GraphSmoothConfig)
    """Pull items towards their neighbours."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Train a low-rank correction, and vectors of the side columns, on co-occurring pairs."""
    side: list[str] = field(default_factory=list)
    """Categorical columns of the items whose learned vectors are added."""
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    """Fuse co-occurrence into the vectors."""

    def __post_init__(self) -> None:
        """Check that no side column is named twice."""
        if len(set(self.side)) != len(self.side):
            raise ConfigError(
                f"vectors.side must name each column once, got {self.side}. Remove the repeated."
            )

    @property
    def transforms(self) -> Transforms:
        """What changes the vectors."""
        return Transforms(self.smooth, self.adapter, self.behaviour, has_side=bool(self.side))

    def canonical(self) -> VectorsConfig:
        """The same vectors, unused fields at their defaults: equal inputs share keys."""
        transforms, default = self.transforms, VectorsConfig(space=self.space)
        if self.smooth.gamma:
            default.smooth = self.smooth
        if transforms.adapts:
            default.adapter, default.side = self.adapter, list(self.side)
        if self.behaviour.alpha:
            default.behaviour = self.behaviour
        if transforms.reads_counts:
            default.counts = self.counts
        return default


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
        config: space and transforms.
        dataset: the prepared dataset.
        store: where changed vectors are kept as an artifact of kind `vectors`.

    Raises:
        ConfigError: when a side column does not exist.
        DataError: when there is no such space.
    """
    plain = open_space(config.space, dataset, store)
    if not config.transforms.any:
        return plain
    config = config.canonical()
    words = ["forge-ray", "sid", "fit", dataset.artifact.uri]
    overrides = [f"vectors.{one}" for one in to_overrides(config)]
    artifact = store.build(
        KIND,
        f"{_short_name(config.space)}-{_names(config.transforms)}",
        to_mapping(config),
        parents=tuple(dict.fromkeys((dataset.key, plain.key))),
        produce=lambda writer: _write_transformed(config, dataset, plain, writer),
        command=shlex.join(words + overrides),
    )
    return _of_artifact(artifact, plain.num_items)


def open_space(space: str, dataset: Dataset, store: ArtifactStore) -> VectorSet:
    """Find vectors by name: a space of the dataset, else an artifact made from the dataset.

    An artifact of kind `vectors` holds Parquet shards of `vectors_schema` below `vectors/`, one row
    per item, and names the dataset among its parents.

    Args:
        space: name of a space; name, reference or key prefix of an artifact.
        dataset: the prepared dataset.
        store: where artifacts are looked up.

    Raises:
        DataError: when nothing, or more than one artifact, answers to the name.
    """
    if space in dataset.spaces:
        return VectorSet(
            key=dataset.key,
            filesystem=dataset.filesystem,
            files=tuple(dataset.vector_files(space)),
            num_items=dataset.num_items,
            dim=dataset.vector_dim(space),
        )
    made = [one for one in store.manifests(KIND) if dataset.key in one.parents]
    found = [one for one in made if _answers(one, space)]
    artifact = store.find(KIND, found[0].key) if len(found) == 1 else None
    if artifact is None:
        choices = [*dataset.spaces, *(one.ref for one in found or made)]
        raise DataError(
            f"vectors.space must be one of {choices}, got {space!r}. Prepare {dataset.name!r} with "
            "vectors, make some with `forge-ray embed text`, or choose an existing space."
        )
    return _of_artifact(artifact, dataset.num_items)


def _answers(manifest: Manifest, space: str) -> bool:
    is_key = len(space) >= 6 and manifest.key.startswith(space)
    return is_key or space in (manifest.name, manifest.ref, manifest.ref.partition("/")[2])


def _of_artifact(artifact: Artifact, num_items: int) -> VectorSet:
    files = tuple(artifact.files("vectors"))
    schema = pq.read_schema(files[0], filesystem=artifact.filesystem)
    dim = int(schema.field("vector").type.list_size)
    return VectorSet(artifact.key, artifact.filesystem, files, num_items, dim)


def _names(transforms: Transforms) -> str:
    active = {
        "smoothed": transforms.smooth.gamma > 0,
        "adapted": transforms.adapts,
        "fused": transforms.behaviour.alpha > 0,
    }
    return "-".join(name for name, is_active in active.items() if is_active)


def _short_name(space: str) -> str:
    return space.rstrip("/").rpartition("/")[2]


def train_counts(config: CountsConfig, dataset: Dataset) -> sp.csr_array:
    """Relate items by the train histories of a dataset; it reads no other split.

    Returns:
        Symmetric float64 [N, N], see `CountsConfig.count`.
    """
    batches = dataset.sequence_batches("train")
    return config.count((batch.items for batch in batches), dataset.num_items)


def _write_transformed(
    config: VectorsConfig, dataset: Dataset, plain: VectorSet, writer: ArtifactWriter
) -> ArtifactInfo:
    """In memory, on one machine: `Transforms.peak_bytes`, logged before the expensive part."""
    transforms = config.transforms
    side = read_side(dataset, config.side)
    counts = train_counts(config.counts, dataset) if transforms.reads_counts else None
    related = 0 if counts is None else int(counts.nnz)
    needed = transforms.peak_bytes(plain.num_items, plain.dim, related)
    logger.info(
        "vectors of %s items: %s, at most %.1f GB of memory",
        f"{plain.num_items:,}", _names(transforms), needed / 1e9,
    )  # fmt: skip
    vectors = plain.take(np.arange(plain.num_items))
    result = transform(vectors, counts, transforms, side=side)
    _write_shards(result.vectors, writer)
    rows = {"items": plain.num_items, "cooccurring_pairs": related}
    return ArtifactInfo(rows=rows, metrics={**result.facts, "peak_bytes_bound": needed})


def _write_shards(vectors: npt.NDArray[np.float32], writer: ArtifactWriter) -> None:
    num_items, dim = vectors.shape
    schema = vectors_schema(dim, "float32")
    for shard in range(math.ceil(num_items / SHARD_ROWS)):
        rows = slice(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        flat = pa.array(vectors[rows].reshape(-1), pa.float32())
        index = pa.array(np.arange(num_items, dtype=np.int32)[rows])
        columns = [index, pa.FixedSizeListArray.from_arrays(flat, dim)]
        with writer.open("vectors", f"part-{shard:05d}.parquet") as stream:
            pq.write_table(pa.Table.from_arrays(columns, schema=schema), stream)
