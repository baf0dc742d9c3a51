"""What a quantizer is fitted on: a sample of the vectors, and the behaviour that its losses read.

Everything here comes from the train part. Resident: 4·D bytes for each training vector (none with
a file to map them from), 16 bytes a pair, and, where an alignment reads users, 12 bytes for each of
their interactions, 32 for each event and 4·D for each user.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.schema import Dataset, Pairs
from forge_ray.embed.pairs import load_pairs
from forge_ray.embed.teachers import Teacher, load_teacher
from forge_ray.embed.teachers.artifact import train_log
from forge_ray.embed.teachers.base import TrainLog
from forge_ray.embed.vectors import VectorSet
from forge_ray.sid.alignment.batch import INTERACTIONS
from forge_ray.sid.quantizers.base import (
    FloatArray,
    Int64Array,
    QuantizerConfig,
    TrainingPairs,
    TrainingSet,
)
from forge_ray.sid.quantizers.rq_vae import RqVaeConfig
from forge_ray.sid.quantizers.shuffled import ShuffledConfig
from forge_ray.sid.train_data import map_vectors

_MAX_USERS = 1_000_000
_MAX_EVENTS = 5_000_000


def load_training_set(
    config: QuantizerConfig,
    dataset: Dataset,
    source: VectorSet,
    store: ArtifactStore,
    *,
    seed: int,
    vector_file: Path | None = None,
) -> TrainingSet:
    """Read, or build once, what a quantizer wants.

    Args:
        config: its size limit, pair sources, teachers and users.
        dataset: the prepared dataset.
        source: vectors of its items.
        store: where teachers and computed pairs are kept.
        seed: of the samples.
        vector_file: where to put the vectors instead of in memory.

    Raises:
        ConfigError: when there is no pair source of a name.
        DataError: when the dataset has no pairs or train interactions that are needed.
    """
    pairs = {
        name: load_pairs(name, dataset, store, vectors=source)
        for name in config.pair_sources
        if name != INTERACTIONS
    }
    items = training_items(
        source.num_items, config.max_train_vectors, next(iter(pairs.values()), None), seed=seed
    )
    row = np.full(source.num_items, -1, dtype=np.int64)
    row[items] = np.arange(len(items))
    vectors = source.take(items) if vector_file is None else map_vectors(source, items, vector_file)
    named = {name: _within(one, row) for name, one in pairs.items()}
    trained = trained_part(config)
    if trained is None:
        return TrainingSet(vectors, pairs=named)
    wanted = trained.teachers
    teachers = {name: load_teacher(one, dataset, store) for name, one in wanted.items()}
    known = {name: np.asarray(one.items[items]) for name, one in teachers.items()}
    if INTERACTIONS not in config.pair_sources:
        return TrainingSet(vectors, pairs=named, teachers=known)
    limit = min((one.max_users for one in wanted.values()), default=_MAX_USERS)
    log = train_log(dataset, max_users=limit)
    return TrainingSet(
        vectors,
        pairs={**named, INTERACTIONS: user_events(log, row, seed=seed)},
        teachers=known,
        users=mean_vectors(log, row, vectors),
        user_teachers=_user_vectors(teachers, log),
    )


def trained_part(config: QuantizerConfig) -> RqVaeConfig | None:
    """The configuration that is trained with losses: this one, the one it shuffles, or none."""
    inner = config.of if isinstance(config, ShuffledConfig) else config
    return inner if isinstance(inner, RqVaeConfig) else None


def training_items(
    num_items: int, limit: int, pairs: TrainingPairs | Pairs | None, *, seed: int
) -> Int64Array:
    """Choose the items to fit on: all, or a sample in which pairs keep both ends.

    Args:
        num_items: catalogue size N.
        limit: most items to choose.
        pairs: pairs of item indices, or None for a uniform sample.
        seed: fixes the draw.

    Returns:
        int64 [min(N, limit)] sorted item indices. With pairs, at most half of them are chosen as
        ends of random pairs, the rest uniformly.
    """
    if num_items <= limit:
        return np.arange(num_items, dtype=np.int64)
    rng = np.random.default_rng(seed)
    chosen = np.zeros(num_items, dtype=bool)
    if pairs is not None and len(pairs):
        # Each pair brings at most two items, so this many cannot exceed half of the limit.
        drawn = rng.choice(len(pairs), size=min(len(pairs), limit // 4), replace=False)
        chosen[pairs.anchor[drawn]] = True
        chosen[pairs.positive[drawn]] = True
    others = np.flatnonzero(~chosen)
    missing = limit - int(chosen.sum())
    chosen[rng.choice(others, size=missing, replace=False)] = True
    return np.flatnonzero(chosen)


def _within(pairs: Pairs, row: Int64Array) -> TrainingPairs:
    """Pairs whose two ends are among the training items, as rows of them."""
    anchor, positive = row[pairs.anchor], row[pairs.positive]
    kept = (anchor >= 0) & (positive >= 0)
    return TrainingPairs(anchor[kept], positive[kept])


def user_events(log: TrainLog, row: Int64Array, *, seed: int) -> TrainingPairs:
    """Pair every interaction with another item of its user and another user of its item.

    Args:
        log: train histories.
        row: int64 [N], row of each item among the training vectors, -1 for the others.
        seed: of the partners, and of the sample beyond five million events.

    Returns:
        Events that have both partners among the training items; users are rows of the log.
    """
    rng = np.random.default_rng(seed)
    item, user = row[log.items.values], log.items.row_ids
    order = np.argsort(item, kind="stable")
    other_item = item[_partners(user, rng)]
    other_user = np.empty_like(user)
    other_user[order] = user[order][_partners(item[order], rng)]
    kept = (item >= 0) & (other_item >= 0) & (item != other_item) & (user != other_user)
    chosen = np.flatnonzero(kept)
    if len(chosen) > _MAX_EVENTS:
        chosen = np.sort(rng.choice(chosen, size=_MAX_EVENTS, replace=False))
    return TrainingPairs(
        item[chosen],
        other_item[chosen],
        user=user[chosen].astype(np.int64),
        user_positive=other_user[chosen].astype(np.int64),
    )


def _partners(groups: Int64Array, rng: np.random.Generator) -> Int64Array:
    """For each place of a grouped list another random place of its group, or itself if alone."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else groups
    sizes = np.diff(np.r_[starts, len(groups)])
    start, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    step = 1 + (rng.random(len(groups)) * (size - 1)).astype(np.int64)
    moved = start + (np.arange(len(groups)) - start + step) % size
    return np.asarray(np.where(size > 1, moved, np.arange(len(groups))))


def mean_vectors(log: TrainLog, row: Int64Array, vectors: FloatArray) -> FloatArray:
    """Average the vectors of each user's train items.

    Args:
        log: U train histories.
        row: int64 [N], row of each item among the training vectors, -1 for the others.
        vectors: float32 [n, D].

    Returns:
        float32 [U, D]; zero for a user without a training item.
    """
    item, user = row[log.items.values], log.items.row_ids
    known = item >= 0
    shape = (len(log), len(vectors))
    weights = np.ones(int(known.sum()), dtype=np.float32)
    histories = sp.csr_array((weights, (user[known], item[known])), shape=shape)
    counts = np.maximum(np.bincount(user[known], minlength=len(log)), 1)
    return np.asarray(histories @ vectors / counts[:, None], dtype=np.float32)


def _user_vectors(teachers: Mapping[str, Teacher], log: TrainLog) -> dict[str, FloatArray]:
    """Each teacher's vectors of the log's users; zero for users that it did not read."""
    found = {}
    for name, teacher in teachers.items():
        order = np.argsort(teacher.user_index, kind="stable")
        place = np.searchsorted(teacher.user_index[order], log.user_index)
        place = order[np.minimum(place, len(order) - 1)]
        is_known = teacher.user_index[place] == log.user_index
        found[name] = np.where(is_known[:, None], teacher.users[place], np.float32(0))
    return found
