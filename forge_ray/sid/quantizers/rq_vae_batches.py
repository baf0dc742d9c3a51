"""Which rows every training step of the RQ-VAE sees, computed from the step's number alone.

A global batch depends on seed and step, never on who asks: any worker computes its share of any
step, so a run resumes at any step, and any number of workers sees the same batches. Knows rows and
sources; nothing about networks or losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from forge_ray.data.permutation import permuted
from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import FloatArray, Int64Array, TrainingPairs, TrainingSet

if TYPE_CHECKING:
    from forge_ray.sid.quantizers.rq_vae_config import RqVaeConfig

PLAIN = -1
"""Type of a step without pairs."""
_PLAIN_STREAM, _ORDER_STREAM, _PAIR_STREAM = 0, 1, 2


@dataclass(frozen=True, eq=False)
class StepRows:
    """What one worker handles in one step, as rows of the training set."""

    source: str
    """Where the pairs come from; empty for a step without pairs."""
    plain: Int64Array
    """int64 [b] rows to reconstruct."""
    anchor: Int64Array
    """int64 [p] rows of pair anchors."""
    positive: Int64Array
    """int64 [p] rows of pair positives."""
    users: tuple[Int64Array, Int64Array] | None = None
    """int64 [p] rows of the user behind each pair, and of another user of its anchor."""

    @property
    def all(self) -> Int64Array:
        """int64 [b + 2p]: plain rows, anchors, positives."""
        return np.concatenate([self.plain, self.anchor, self.positive])


@dataclass(frozen=True, eq=False)
class UserRows:
    """Users on one side of a step's pairs."""

    users: Int64Array
    """int64 [p]."""
    vectors: FloatArray
    """float32 [p, m]."""
    teachers: Mapping[str, FloatArray]
    """float32 [p, t], by teacher."""


@dataclass(frozen=True, eq=False)
class StepBatch:
    """The rows of one step with their numbers."""

    step: int
    rows: StepRows
    vectors: FloatArray
    """float32 [b + 2p, D], in the order of `StepRows.all`."""
    teachers: Mapping[str, FloatArray] = field(default_factory=dict)
    """float32 [b + p, t] of plain rows and anchors, by teacher."""
    users: tuple[UserRows, UserRows] | None = None
    """The two users of each pair, for pairs that come from interactions."""


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The type of every step and the sizes of global batches; 5 bytes a step, nothing per row."""

    total: int
    """Steps of the run."""
    num_rows: int
    """Training vectors."""
    plain_size: int
    """Plain rows of a step that has some."""
    pair_size: int
    """Pairs of a step that has some."""
    sources: tuple[str, ...]
    counts: tuple[int, ...]
    """Pairs of each source."""
    kinds: npt.NDArray[np.int8]
    """[total] index of the step's pair source, or `PLAIN`."""
    ordinals: npt.NDArray[np.int32]
    """[total] how many steps of this type came before."""
    is_masked: bool
    """Every step has plain rows beside its pairs."""
    seed: int

    def share(
        self, step: int, pairs: Mapping[str, TrainingPairs], *, rank: int = 0, size: int = 1
    ) -> StepRows:
        """Give the rows of one worker in one step.

        Args:
            step: 0..total-1.
            pairs: of each source, as rows of the training set.
            rank: the worker.
            size: workers; they divide the batch sizes (`check_workers`).
        """
        kind, ordinal = int(self.kinds[step]), int(self.ordinals[step])
        none = np.zeros(0, dtype=np.int64)
        has_plain = kind == PLAIN or self.is_masked
        plain_number = step if self.is_masked else ordinal
        plain = self._take(plain_number, self.plain_size, _PLAIN_STREAM, self.num_rows)
        plain = _part(plain, rank, size) if has_plain else none
        if kind == PLAIN:
            return StepRows("", plain, none, none)
        stream, count = _PAIR_STREAM + kind, self.counts[kind]
        chosen = self._take(ordinal, min(self.pair_size, count), stream, count)
        mine, ends = _part(chosen, rank, size), pairs[self.sources[kind]]
        anchor, positive = np.asarray(ends.anchor[mine]), np.asarray(ends.positive[mine])
        users = None
        if ends.user is not None and ends.user_positive is not None:
            users = np.asarray(ends.user[mine]), np.asarray(ends.user_positive[mine])
        return StepRows(self.sources[kind], plain, anchor, positive, users)

    def _take(self, number: int, size: int, stream: int, count: int) -> Int64Array:
        """Rows of the batch `number`: batches pass over all rows before any row repeats."""
        places = np.arange(number * size, (number + 1) * size, dtype=np.int64)
        epochs = places // count
        parts = [
            permuted(places[epochs == epoch] % count, count, key=(self.seed, stream, int(epoch)))
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return np.concatenate(parts)


def _part(rows: Int64Array, rank: int, size: int) -> Int64Array:
    each = len(rows) // size
    return rows[rank * each : (rank + 1) * each]


def plan_batches(
    config: RqVaeConfig,
    num_rows: int,
    counts: Mapping[str, int],
    *,
    shares: Mapping[str, float],
    seed: int,
) -> BatchPlan:
    """Fix the type of every step of a run.

    Args:
        config: batch sizes, epochs, pair share and mixing.
        num_rows: training vectors.
        counts: pairs by source.
        shares: how the pair steps are divided among the sources; any scale.
        seed: of the order of steps and rows.
    """
    sources = tuple(counts)
    pair_share = config.pair_share if sources else 0.0
    total = num_steps(config, num_rows, has_pairs=bool(sources))
    is_masked = config.mixing == "masked" and bool(sources)
    weights = np.array([shares[name] for name in sources], dtype=np.float64)
    weights = weights / weights.sum() if len(weights) else weights
    edges = np.rint(np.cumsum(weights) * total * (1.0 if is_masked else pair_share)).astype(int)
    kinds = np.full(total, PLAIN, dtype=np.int8)
    for kind in reversed(range(len(sources))):
        kinds[: edges[kind]] = kind
    kinds = np.random.default_rng([seed, _ORDER_STREAM]).permutation(kinds)
    num_plain, num_pairs = batch_sizes(config, has_pairs=bool(sources))
    return BatchPlan(
        total=total,
        num_rows=num_rows,
        plain_size=min(num_plain, num_rows),
        pair_size=num_pairs,
        sources=sources,
        counts=tuple(counts.values()),
        kinds=kinds,
        ordinals=_ordinals(kinds, len(sources)),
        is_masked=is_masked,
        seed=seed,
    )


def _ordinals(kinds: npt.NDArray[np.int8], num_sources: int) -> npt.NDArray[np.int32]:
    ordinals = np.zeros(len(kinds), dtype=np.int32)
    for kind in range(PLAIN, num_sources):
        steps = np.flatnonzero(kinds == kind)
        ordinals[steps] = np.arange(len(steps))
    return ordinals


def batch_sizes(config: RqVaeConfig, *, has_pairs: bool) -> tuple[int, int]:
    """Plain rows and pairs of a step that has them."""
    if config.mixing == "alternate" or not has_pairs:
        return config.batch_size, config.pair_batch_size
    plain = max(1, round(config.batch_size * (1 - config.pair_share)))
    return plain, max(2, (config.batch_size - plain) // 2)


def num_steps(config: RqVaeConfig, num_vectors: int, *, has_pairs: bool) -> int:
    """Count optimiser steps: `epochs` of reconstruction plus the pair share, bounded.

    Args:
        config: batch sizes, epochs and mixing.
        num_vectors: training vectors.
        has_pairs: whether contrastive steps are mixed in.
    """
    plain, _ = batch_sizes(config, has_pairs=has_pairs)
    per_epoch = math.ceil(num_vectors / plain)
    is_shared = has_pairs and config.mixing == "alternate"
    plain_share = 1 - config.pair_share if is_shared else 1.0
    return max(1, min(config.max_steps, math.ceil(config.epochs * per_epoch / plain_share)))


def check_workers(plan: BatchPlan, workers: int) -> None:
    """Refuse a number of workers that cannot share the batches equally.

    Raises:
        ConfigError: when a batch is no multiple of the workers.
    """
    sizes = {"rows": plan.plain_size}
    pair_sizes = {
        f"{n} pairs": min(plan.pair_size, c) for n, c in zip(plan.sources, plan.counts, strict=True)
    }
    for name, count in {**sizes, **pair_sizes}.items():
        if count % workers:
            raise ConfigError(
                f"train.workers must divide the {count} {name} of a step, got {workers}. Change "
                "train.workers, quantizer.batch_size or quantizer.pair_batch_size."
            )


@dataclass(frozen=True, eq=False)
class Feed:
    """Reads the batches of one worker out of a training set."""

    data: TrainingSet
    plan: BatchPlan
    rank: int = 0
    size: int = 1

    def batch(self, step: int) -> StepBatch:
        """Gather the vectors of one step: 4·D bytes for each of its rows."""
        rows = self.plan.share(step, self.data.pairs, rank=self.rank, size=self.size)
        teachers = _taken(self.data.teachers, np.concatenate([rows.plain, rows.anchor]))
        users = None
        if rows.users is not None:
            users = self._user_rows(rows.users[0]), self._user_rows(rows.users[1])
        return StepBatch(step, rows, _take_rows(self.data.vectors, rows.all), teachers, users)

    def _user_rows(self, rows: Int64Array) -> UserRows:
        assert self.data.users is not None, "interactions come with users"
        teachers = _taken(self.data.user_teachers, rows)
        return UserRows(rows, _take_rows(self.data.users, rows), teachers)

    def batches(self, start: int) -> Iterator[StepBatch]:
        """Yield the steps from `start` to the last."""
        return (self.batch(step) for step in range(start, self.plan.total))


def _taken(arrays: Mapping[str, FloatArray], rows: Int64Array) -> dict[str, FloatArray]:
    return {name: _take_rows(array, rows) for name, array in arrays.items()}


def _take_rows(array: FloatArray, rows: Int64Array) -> FloatArray:
    """Copy some rows into memory; `array` may be mapped from a file."""
    return np.asarray(array[rows], dtype=np.float32)
