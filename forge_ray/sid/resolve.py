"""Resolving the codes of a whole catalogue: in this process, or cut by prefix through Ray Data.

A resolver works inside one prefix at a time. A large catalogue is therefore cut into partitions of
whole prefixes; vectors, where a resolver asks for any, travel once, and only those of rows that may
move, to the partition of their row. The result equals the one of a single process.

Memory of the calling process: codes and hashes of all items and about 60 bytes per item while the
rows that may move are looked for; of a task, the vectors of its partition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from forge_ray.data import tasks
from forge_ray.data.hashing import distinct_hashes, mix64
from forge_ray.data.schema import Dataset, matrix
from forge_ray.embed.vectors import VectorSet
from forge_ray.sid.quantizers.base import FloatArray, Int64Array, Quantizer
from forge_ray.sid.resolvers.base import (
    IntArray,
    Placement,
    Problem,
    Resolution,
    ResolverConfig,
    complete,
)
from forge_ray.sid.storage import QuantizerState
from forge_ray.sid.table import SidTable
from forge_ray.threads import set_threads

PARTITION_ROWS = 1 << 18


@dataclass(frozen=True, eq=False)
class Published:
    """A resolved table that a grown catalogue must keep."""

    codes: IntArray
    """Integers [N, L'] in the order of the grown catalogue, -1 in the rows of new items."""
    key: str
    """Content key of the published table."""


def resolve_catalogue(
    config: ResolverConfig,
    raw: SidTable,
    *,
    dataset: Dataset,
    source: VectorSet,
    state: QuantizerState,
    local_items: int,
    published: IntArray | None = None,
) -> Resolution:
    """Apply a collision policy to the codes of a dataset.

    Args:
        config: the policy.
        raw: codes as the quantizer gave them.
        dataset: ids decide ties, train counts rank.
        source: vectors that were encoded.
        state: the quantizer that encoded them.
        local_items: catalogues up to this size are resolved in this process; a Ray must be up for
            larger ones.
        published: resolved codes [N, L'] that must not change, -1 in the rows of new items.
    """
    problem = Problem(
        codes=np.asarray(raw.codes),
        codebook_sizes=raw.codebook_sizes,
        hashes=distinct_hashes(dataset.items(["item_id"])["item_id"]),
        train_counts=dataset.train_counts(),
        published=published,
    )
    is_small = problem.num_items <= local_items
    if is_small or config.level_written(raw.num_levels) is None:
        return complete(config, place_here(config, problem, source, state.load()), problem)
    return complete(config, place_on_ray(config, problem, source, state), problem)


def place_here(
    config: ResolverConfig, problem: Problem, source: VectorSet, quantizer: Quantizer
) -> Placement:
    """Place a table in this process.

    Args:
        config: the policy.
        problem: the whole table, without sources.
        source: vectors of the catalogue; those of rows that may move are held.
        quantizer: what encoded them.
    """
    rows = config.rows_to_place(problem)
    vectors = np.zeros((0, source.dim), dtype=np.float32)
    if len(rows):
        order = quantizer.item_order(problem.num_items)
        vectors = source.take(rows if order is None else order[rows])
    return config.place(_with_vectors(problem, rows, vectors, quantizer))


def _with_vectors(
    problem: Problem, rows: Int64Array, vectors: FloatArray, quantizer: Quantizer
) -> Problem:
    """The problem with sources that answer for `rows` [m], whose vectors [m, D] are given."""
    at = np.full(problem.num_items, -1, dtype=np.int64)
    at[rows] = np.arange(len(rows))

    def candidates(asked: Int64Array, limit: int) -> Int64Array:
        return quantizer.last_level_candidates(vectors[at[asked]], limit)

    def distances(asked: Int64Array) -> FloatArray:
        return quantizer.last_level_distances(vectors[at[asked]])

    return replace(problem, candidates=candidates, distances=distances)


# ---- on Ray ----


def place_on_ray(
    config: ResolverConfig,
    problem: Problem,
    source: VectorSet,
    state: QuantizerState,
    *,
    partition_rows: int = PARTITION_ROWS,
) -> Placement:
    """Place a table partition by partition; see the module docstring.

    Args:
        config: the policy.
        problem: the whole table, without sources.
        source: vectors of the catalogue.
        state: the quantizer.
        partition_rows: about how many rows a task resolves.
    """
    partitions = _Partitions.cut(problem, partition_rows)
    rows = config.rows_to_place(problem)
    shared = ray.put(_Shared(config, replace(problem), partitions, state))
    if len(rows):
        placed = tasks.exchange(
            tasks.for_each(
                range(len(source.files)),
                _route_vectors,
                source=source,
                route=ray.put(_Route.to(rows, problem.num_items, partitions, state)),
            ),
            _place_partition,
            shards=partitions.count,
            shared=shared,
        )
    else:
        # Nothing travels but numbers: every task takes its rows from the shared table.
        placed = tasks.for_each(range(partitions.count), _place_number, shared=shared)
    return _gather(config, problem, tasks.tables(placed))


@dataclass(frozen=True, eq=False)
class _Partitions:
    """Rows of a table grouped by a hash of their prefix."""

    of_row: npt.NDArray[np.int32]
    """int32 [N] partition of each row."""
    order: Int64Array
    """int64 [N] rows, partition by partition."""
    ends: Int64Array
    """int64 [partitions]."""

    @classmethod
    def cut(cls, problem: Problem, partition_rows: int) -> _Partitions:
        """Cut into partitions of about `partition_rows`; a larger prefix stays whole."""
        count = max(1, -(-problem.num_items // partition_rows))
        prefixes = (problem.keys // problem.last_size).astype(np.uint64)
        of_row = (mix64(prefixes + np.uint64(1)) % np.uint64(count)).astype(np.int32)
        sizes = np.bincount(of_row, minlength=count)
        return cls(of_row, np.argsort(of_row, kind="stable"), np.cumsum(sizes))

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.ends)

    def rows(self, number: int) -> Int64Array:
        """Rows of one partition, ascending."""
        start = self.ends[number - 1] if number else 0
        return self.order[start : self.ends[number]]


@dataclass(frozen=True, eq=False)
class _Shared:
    """What every partition's task reads; the arrays stay in Ray's shared memory."""

    config: ResolverConfig
    problem: Problem
    partitions: _Partitions
    state: QuantizerState


@dataclass(frozen=True, eq=False)
class _Route:
    """Where the vector of each item goes."""

    row: Int64Array
    """int64 [N] row that each item's vector codes, -1 when nobody asks for it."""
    shard: npt.NDArray[np.int32]
    """int32 [N] partition of each row."""

    @classmethod
    def to(
        cls, rows: Int64Array, num_items: int, partitions: _Partitions, state: QuantizerState
    ) -> _Route:
        """Route the vectors that code `rows`."""
        order = state.load().item_order(num_items)
        row = np.full(num_items, -1, dtype=np.int64)
        row[rows if order is None else order[rows]] = rows
        return cls(row, partitions.of_row)


def _route_vectors(
    number: int, *, source: VectorSet, route: ray.ObjectRef[_Route]
) -> Iterator[pa.Table]:
    where: _Route = ray.get(route)
    for batch in replace(source, files=(source.files[number],)).batches():
        rows = where.row[batch.indices]
        kept = rows >= 0
        flat = pa.array(batch.vectors[kept].reshape(-1), pa.float32())
        columns = {
            "shard": where.shard[rows[kept]],
            "row": rows[kept],
            "vector": pa.FixedSizeListArray.from_arrays(flat, source.dim),
        }
        yield pa.table(columns)


def _place_partition(routed: pa.Table, *, shared: ray.ObjectRef[_Shared]) -> pa.Table:
    """Resolve a partition some of whose rows may move, with the vectors of those."""
    set_threads(1)
    table: _Shared = ray.get(shared)
    rows = table.partitions.rows(routed["shard"][0].as_py())
    asked = np.searchsorted(rows, routed["row"].to_numpy())
    problem = _with_vectors(
        table.problem.take(rows), asked, matrix(routed["vector"]), table.state.load()
    )
    return _placed(rows, problem, table.config.place(problem))


def _place_number(number: int, *, shared: ray.ObjectRef[_Shared]) -> Iterator[pa.Table]:
    table: _Shared = ray.get(shared)
    rows = table.partitions.rows(number)
    quantizer = table.state.load()
    nobody = np.zeros((0, quantizer.input_dim), dtype=np.float32)
    problem = _with_vectors(table.problem.take(rows), rows[:0], nobody, quantizer)
    yield _placed(rows, problem, table.config.place(problem))


_PLACED = pa.schema(
    {"row": pa.int64(), "last": pa.int64(), "total": pa.string(), "value": pa.float64()}
)
"""A new last or appended code per row that got one, and one row per total."""


def _placed(rows: Int64Array, problem: Problem, placement: Placement) -> pa.Table:
    last = placement.codes[:, -1]
    known = problem.current()
    is_appended = placement.codes.shape[1] > known.shape[1]
    changed = np.ones(len(rows), dtype=bool) if is_appended else last != known[:, -1]
    count, names = int(changed.sum()), list(placement.totals)
    columns = [
        pa.array(np.append(rows[changed], np.full(len(names), -1)), pa.int64()),
        pa.array(np.append(last[changed], np.full(len(names), -1)), pa.int64()),
        pa.concat_arrays([pa.nulls(count, pa.string()), pa.array(names, pa.string())]),
        pa.array(np.append(np.zeros(count), list(placement.totals.values())), pa.float64()),
    ]
    return pa.table(columns, schema=_PLACED)


def _gather(config: ResolverConfig, problem: Problem, placed: Iterator[pa.Table]) -> Placement:
    """The placement of the whole table from those of its partitions."""
    codes = np.array(problem.current())
    totals: dict[str, float] = {}
    if config.level_written(codes.shape[1]) == codes.shape[1]:
        codes = np.column_stack([codes, np.zeros(len(codes), dtype=np.int64)])
    for table in placed:
        is_row = np.asarray(table["row"].to_numpy() >= 0)
        codes[table["row"].to_numpy()[is_row], -1] = table["last"].to_numpy()[is_row]
        for total in table.filter(pa.array(~is_row)).to_pylist():
            totals[total["total"]] = totals.get(total["total"], 0.0) + total["value"]
    return Placement(codes, totals)
