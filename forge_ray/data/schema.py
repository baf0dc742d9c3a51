"""The dataset artifact: its columns, and the handle every later stage reads it through.

Knows Parquet layouts and Arrow. It knows nothing about Ray, models or SIDs, and it never holds the
interaction log: sequences come as batches, vectors as batches or as a sample. Methods that do load
a whole part say so and state the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from forge_ray.artifacts import Artifact, ArtifactStore

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
KIND = "dataset"
DEFAULT_SPACE = "default"

TRAIN_SCHEMA = pa.schema(
    {"user_index": pa.int64(), "items": pa.list_(pa.int32()), "timestamps": pa.list_(pa.int64())}
)
HELD_OUT_SCHEMA = pa.schema(
    {"user_index": pa.int64(), "items": pa.list_(pa.int32()), "targets": pa.list_(pa.int32())}
)
PAIRS_SCHEMA = pa.schema({"anchor": pa.int32(), "positive": pa.int32(), "weight": pa.float32()})
USERS_SCHEMA = pa.schema({"user_index": pa.int64(), "user_id": pa.string()})


def vectors_schema(dim: int, dtype: Literal["float32", "float16"]) -> pa.Schema:
    """Return the columns of a vector shard: `item_index` and `vector` of ``dim`` numbers."""
    value = pa.float32() if dtype == "float32" else pa.float16()
    return pa.schema({"item_index": pa.int32(), "vector": pa.list_(value, dim)})


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Some users of one split.

    Attributes:
        user_index: ``[B]`` int64.
        items: B histories of item indices, oldest first (int32).
        targets: B lists of the held-out items that follow; None in the train split.
        queries: what each user asked for, where the rows are those of a query set.
    """

    user_index: NDArray[np.int64]
    items: Ragged
    targets: Ragged | None
    queries: list[str] | None = None

    def __len__(self) -> int:
        return len(self.user_index)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Item-to-item pairs counted on the train part.

    Attributes:
        anchor: ``[P]`` int32 item index.
        positive: ``[P]`` int32 item index of an item seen near the anchor.
        weight: ``[P]`` float32, ``count / sqrt(degree(anchor) * degree(positive))``.
    """

    anchor: NDArray[np.int32]
    positive: NDArray[np.int32]
    weight: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.anchor)


@dataclass(frozen=True, slots=True)
class VectorBatch:
    """Vectors of some items.

    Attributes:
        indices: ``[n]`` int64 item index of each row.
        vectors: ``[n, D]`` float32.
    """

    indices: NDArray[np.int64]
    vectors: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.indices)


class Users(Protocol):
    """Rows of held-out users that rankers are scored on: a dataset, or a query set of one."""

    @property
    def key(self) -> str:
        """Content key of the rows."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def filesystem(self) -> FileSystem:
        """The filesystem of `sequence_files`."""

    def sequence_files(self, split: Split) -> list[str]:
        """Shards of a split, columns as in `HELD_OUT_SCHEMA` and perhaps `query`."""

    def train_counts(self) -> NDArray[np.int64]:
        """Train interactions of every item ``[N]``."""


class Dataset:
    """Read access to one prepared dataset.

    Picklable wherever the artifact is, so a handle can be sent to a worker.
    """

    artifact: Artifact

    def __init__(self, artifact: Artifact) -> None:
        if artifact.manifest.kind != KIND:
            raise ConfigError(
                f"dataset must be an artifact of kind {KIND!r}, got kind "
                f"{artifact.manifest.kind!r} at {artifact.uri}. Run `forge-ray data prepare`."
            )
        self.artifact = artifact

    @classmethod
    def open(cls, store: ArtifactStore, ref: str) -> Dataset:
        """Open by artifact directory, `dataset/name-key12` or unique key prefix."""
        return cls(store.open(ref, kind=KIND))

    def __repr__(self) -> str:
        return f"Dataset({self.artifact.uri}, items={self.num_items}, users={self.num_users})"

    @property
    def key(self) -> str:
        """The content key; what is derived from this dataset names it as parent."""
        return self.artifact.key

    @property
    def name(self) -> str:
        """The name given at prepare time."""
        return self.artifact.manifest.name

    def has_items_of(self, other: Dataset) -> bool:
        """Whether item indices mean the same in both: one dataset, or two stages of one log."""
        logs = self.artifact.manifest.parents, other.artifact.manifest.parents
        return self.key == other.key or (bool(logs[0]) and logs[0] == logs[1])

    @property
    def filesystem(self) -> FileSystem:
        """The filesystem in which all paths of this handle are valid."""
        return self.artifact.filesystem

    @property
    def rows(self) -> dict[str, int]:
        """Row counts of the manifest, among them the rows skipped on request by cause."""
        return dict(self.artifact.manifest.rows)

    @property
    def al_gr_version(self) -> str:
        """Which of FORGE's two sets of SIDs its inputs belong to; empty where to none."""
        return str(self.artifact.manifest.metrics.get("al_gr_version", ""))

    @property
    def num_items(self) -> int:
        """Catalogue size N; item indices are 0..N-1."""
        return self.artifact.manifest.rows["items"]

    @property
    def num_users(self) -> int:
        """Users with at least one interaction."""
        return self.artifact.manifest.rows["users"]

    def users_file(self, shard: str) -> str:
        """Path of the users whose rows a shard of sequences has.

        All shards of the same users have one name: those of the splits, of query sets and of
        `users/` (columns as in `USERS_SCHEMA`, in index order).

        Args:
            shard: path of a shard of any of them.
        """
        return self.artifact.path("users", shard.rsplit("/", 1)[-1])

    # ---- items ----

    def items(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Load the items table, sorted by `item_index`; memory is that of the columns asked for."""
        wanted = None if columns is None else list(dict.fromkeys(["item_index", *columns]))
        table = self._table(self.artifact.files("items/"), wanted)
        index = table["item_index"].to_numpy()
        if not np.array_equal(index, np.arange(len(index))):
            table = table.take(pc.sort_indices(table, sort_keys=[("item_index", "ascending")]))
        return table if columns is None else table.select(list(columns))

    def item_columns(self) -> list[str]:
        """Names of the columns of the items table."""
        files = self.artifact.files("items/")
        return list(pq.read_schema(files[0], filesystem=self.filesystem).names)

    def item_ids(self) -> NDArray[Any]:
        """Return the user's own item ids ``[N]`` as str objects, in index order."""
        return np.asarray(self.items(["item_id"])["item_id"].to_numpy(), dtype=object)

    def train_counts(self) -> NDArray[np.int64]:
        """Return the number of train interactions of every item ``[N]`` int64."""
        return np.asarray(self.items(["train_count"])["train_count"].to_numpy(), dtype=np.int64)

    # ---- vectors ----

    @property
    def spaces(self) -> tuple[str, ...]:
        """Names of the vector spaces, sorted; empty when the dataset has no vectors."""
        parts = [path.split("/") for path in self.artifact.manifest.files]
        return tuple(sorted({p[1] for p in parts if p[0] == "vectors" and len(p) > 2}))

    def vector_files(self, space: str = DEFAULT_SPACE) -> list[str]:
        """Return the shard paths of a space (columns `item_index`, `vector`), for Ray Data."""
        if space not in self.spaces:
            raise DataError(
                f"vectors.space must be one of {list(self.spaces)}, got {space!r}. "
                f"Prepare {self.name!r} with vectors, or choose an existing space."
            )
        return self.artifact.files(f"vectors/{space}/")

    def vector_dim(self, space: str = DEFAULT_SPACE) -> int:
        """Return the width D of a space."""
        schema = pq.read_schema(self.vector_files(space)[0], filesystem=self.filesystem)
        return int(schema.field("vector").type.list_size)

    def vector_batches(
        self,
        batch_size: int = 65536,
        *,
        space: str = DEFAULT_SPACE,
        files: Sequence[str] | None = None,
    ) -> Iterator[VectorBatch]:
        """Stream the vectors in shard order, at most ``batch_size`` rows at a time.

        Args:
            batch_size: most rows per batch.
            space: name of the vector space.
            files: only these of its shards.
        """
        paths = self.vector_files(space) if files is None else files
        for batch in self._batches(paths, ["item_index", "vector"], batch_size):
            yield VectorBatch(
                batch.column("item_index").to_numpy().astype(np.int64),
                matrix(batch.column("vector")),
            )

    def vectors(self, space: str = DEFAULT_SPACE) -> NDArray[np.float32]:
        """Load all vectors ``[N, D]`` float32 in index order.

        For small catalogues: it takes 4·N·D bytes (2 GB at a million items of 512 numbers). Large
        ones use `vector_batches` or `sample_vectors`.
        """
        out = np.empty((self.num_items, self.vector_dim(space)), dtype=np.float32)
        for batch in self.vector_batches(space=space):
            out[batch.indices] = batch.vectors
        return out

    def sample_vectors(
        self, limit: int, *, seed: int = 0, space: str = DEFAULT_SPACE
    ) -> VectorBatch:
        """Draw ``min(limit, N)`` items without replacement, in index order.

        The draw depends on the seed and N only, not on how the vectors are sharded. Memory is
        4·limit·D bytes plus one byte per item.
        """
        chosen = np.zeros(self.num_items, dtype=bool)
        count = min(limit, self.num_items)
        chosen[np.random.default_rng(seed).permutation(self.num_items)[:count]] = True
        indices = np.flatnonzero(chosen)
        vectors = np.empty((count, self.vector_dim(space)), dtype=np.float32)
        for batch in self.vector_batches(space=space):
            kept = chosen[batch.indices]
            vectors[np.searchsorted(indices, batch.indices[kept])] = batch.vectors[kept]
        return VectorBatch(indices, vectors)

    # ---- behaviour ----

    def pairs(self) -> Pairs:
        """Load the pairs (12 bytes each; at most `pairs.top_k` per item).

        Raises:
            DataError: the dataset was prepared without pairs.
        """
        files = self.artifact.files("pairs/")
        if not files:
            raise DataError(
                f"dataset {self.name} must have pairs for this, got none. Prepare it with "
                "pairs.window > 0."
            )
        table = self._table(files, None)
        return Pairs(*(table[name].to_numpy() for name in PAIRS_SCHEMA.names))

    def sequence_files(self, split: Split) -> list[str]:
        """Return the shard paths of a split, for Ray Data; every shard has at least one user."""
        if split not in SPLITS:
            raise ConfigError(
                f"split must be one of {list(SPLITS)}, got {split!r}. Name an existing split."
            )
        return self.artifact.files(f"sequences/{split}/")

    def sequence_batches(
        self,
        split: Split,
        *,
        batch_rows: int = 65536,
        limit: int | None = None,
        files: Sequence[str] | None = None,
    ) -> Iterator[SequenceBatch]:
        """Stream the users of a split in shard order.

        Args:
            split: "train", "validation" or "test".
            batch_rows: most users per batch.
            limit: stop after this many users. Users are placed in shards, and ordered there, by
                hashes of their id, so the first ones are a random sample, the same at every call.
            files: only these of the split's shards.
        """
        columns = ["user_index", "items"] + ([] if split == "train" else ["targets"])
        left = limit
        paths = self.sequence_files(split) if files is None else files
        for batch in self._batches(paths, columns, batch_rows):
            if left is not None:
                if left <= 0:
                    return
                batch = batch.slice(0, left)
                left -= len(batch)
            yield sequence_batch(batch)

    # ---- reading ----

    def _table(self, files: list[str], columns: list[str] | None) -> pa.Table:
        return pads.dataset(files, filesystem=self.filesystem, format="parquet").to_table(columns)

    def _batches(
        self, files: Sequence[str], columns: list[str], batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        for path in files:
            with self.filesystem.open_input_file(path) as handle:
                yield from pq.ParquetFile(handle).iter_batches(batch_rows, columns=columns)


def sequence_batch(batch: pa.RecordBatch | pa.Table) -> SequenceBatch:
    """View the rows of a sequence shard as arrays; also of a Ray Data batch in Arrow format."""
    names = batch.schema.names
    return SequenceBatch(
        batch.column("user_index").to_numpy(),
        Ragged.from_arrow(batch.column("items")),
        Ragged.from_arrow(batch.column("targets")) if "targets" in names else None,
        batch.column("query").to_pylist() if "query" in names else None,
    )


def matrix(column: pa.Array | pa.ChunkedArray) -> NDArray[np.float32]:
    """Return a fixed-size list column of n vectors as float32 ``[n, D]``."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32, copy=False).reshape(len(array), array.type.list_size)
