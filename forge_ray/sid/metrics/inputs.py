"""What SID tables are scored on: bounded samples of one dataset, read once for many tables.

As a sweep's proxy nothing here sees test events: transitions and popularity come from the train
part, embedding hitrate uses validation targets, and the probe's mixture is fitted on one half of
the validation users and scored on the other. The test form (mixture on all validation users, scores
on test) exists to compare with published tables only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from forge_ray.artifacts import ArtifactInfo, ArtifactStore
from forge_ray.config import to_mapping
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import DEFAULT_SPACE, Dataset, SequenceBatch, VectorBatch
from forge_ray.embed.vectors import VectorSet, open_space
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.backoff import (
    ProbeData,
    ProbeRows,
    count_transitions,
    merge_transitions,
    probe_rows,
)
from forge_ray.sid.metrics.config import ScoreConfig
from forge_ray.sid.metrics.gallery import choose_items, raw_gallery
from forge_ray.sid.metrics.hitrate import HitrateReport, hitrate_of
from forge_ray.sid.metrics.neighbours import GallerySource
from forge_ray.sid.metrics.parallel_data import ParallelData
from forge_ray.sid.metrics.sharded import shard_tasks
from forge_ray.sid.metrics.transitions import HeldOutTransitions

logger = logging.getLogger(__name__)

KIND = "scores"
ScoreSplit = Literal["validation", "test"]
Scores = dict[str, Any]
"""Metric name → number, or text where a number needs its variant named; None where undefined."""


@dataclass(frozen=True, eq=False)
class HitrateRows:
    """Held-out lists for embedding hitrate, one row per target."""

    histories: Ragged
    targets: npt.NDArray[np.int64]
    row_weight: npt.NDArray[np.float64]
    items: npt.NDArray[np.int64]
    """Searched items in index order."""
    gallery: GallerySource
    """Their own vectors."""

    def measure(self, source: GallerySource, config: ScoreConfig) -> HitrateReport:
        """Embedding hitrate of these rows by some vectors of the searched items.

        Args:
            source: the vectors; on Ray when they come in shards and a Ray is up.
            config: neighbours and search limits.
        """
        return hitrate_of(
            source,
            self.histories,
            self.targets,
            k=config.hitrate_k,
            exact_limit=config.hitrate_exact_limit,
            row_weight=self.row_weight,
            tasks=shard_tasks(source.num_shards > 1),
        )

    def raw_vectors(self) -> npt.NDArray[np.float32]:
        """The searched items' own vectors [n, D] in memory, in the order of `items`."""
        shards = [self.gallery.load(shard) for shard in range(self.gallery.num_shards)]
        out = np.empty((len(self.items), shards[0][1].shape[1]), dtype=np.float32)
        for items, vectors in shards:
            out[np.searchsorted(self.items, items)] = vectors
        return out


@dataclass(frozen=True, eq=False)
class ScoreInputs:
    """What all tables of a dataset are scored on; load once, score many."""

    split: ScoreSplit
    probe: ProbeData
    transitions: HeldOutTransitions
    """From the newest history item to each held-out one, of all held-out users read."""
    hitrate: HitrateRows | None
    """None for a dataset without the vector space."""
    sample: VectorBatch | None
    """Items for similarity figures, with their vectors; None without vectors."""
    parallel: ParallelData | None
    """None while the trained probe is off."""
    ceiling: Scores
    """Embedding hitrate of the raw vectors, the same for every table."""


def load_inputs(
    dataset: Dataset,
    *,
    split: ScoreSplit = "validation",
    config: ScoreConfig | None = None,
    store: ArtifactStore | None = None,
) -> ScoreInputs:
    """Read transitions, held-out users and the gallery, within the limits of the configuration.

    Args:
        dataset: a prepared dataset.
        split: `validation` for proxies, `test` for comparing with published tables.
        config: limits and constants.
        store: keeps the raw vectors' hitrate, which is the same for every table; recomputed
            without one.
    """
    config = ScoreConfig() if config is None else config
    if split not in ("validation", "test"):
        raise ConfigError(f"split must be validation or test, got {split!r}. Name one of them.")
    users = max(config.max_users, config.hitrate_users, config.parallel.users)
    held_out = _read_users(dataset, split, users)
    vectors = _open_space(dataset, config, store)
    hitrate = None if vectors is None else _hitrate_rows(vectors, held_out, config)
    probe = _probe_data(dataset, held_out, split, config)
    return ScoreInputs(
        split=split,
        probe=probe,
        # On test the mixture's users are validation users: not what this form is about.
        transitions=_transitions([probe.score] if split == "test" else [probe.fit, probe.score]),
        hitrate=hitrate,
        sample=None if vectors is None else _sample(vectors, config),
        parallel=_parallel_data(dataset, held_out, config) if config.parallel.steps else None,
        ceiling={} if hitrate is None else _ceiling(dataset, hitrate, split, config, store),
    )


def _read_users(dataset: Dataset, split: ScoreSplit, limit: int) -> SequenceBatch:
    parts = list(dataset.sequence_batches(split, limit=limit))
    if not parts:
        raise ConfigError(
            f"dataset must have {split} users to be scored, got none in {dataset.name!r}. "
            "Prepare it with a split that holds users out."
        )
    return SequenceBatch(
        np.concatenate([part.user_index for part in parts]),
        Ragged.concatenate([part.items for part in parts]),
        Ragged.concatenate([part.targets for part in parts if part.targets is not None]),
    )


def _probe_data(
    dataset: Dataset, held_out: SequenceBatch, split: ScoreSplit, config: ScoreConfig
) -> ProbeData:
    parts = [
        count_transitions(
            batch.items, dataset.num_items, window=config.probe_window, decay=config.probe_decay
        )
        for batch in dataset.sequence_batches("train", limit=config.max_train_users)
    ]
    rows = _probe_rows(held_out, config)
    if split == "test":
        validation = _read_users(dataset, "validation", config.max_users)
        fit, score = _probe_rows(validation, config), rows
    else:
        is_fit = _first_half(held_out, config)
        fit, score = rows.take(is_fit), rows.take(~is_fit)
    return ProbeData(
        transitions=merge_transitions(parts, dataset.num_items),
        train_counts=dataset.train_counts(),
        fit=fit,
        score=score,
    )


def _probe_rows(users: SequenceBatch, config: ScoreConfig) -> ProbeRows:
    users = _first_users(users, config.max_users)
    assert users.targets is not None
    return probe_rows(
        users.items, users.targets, length=config.probe_history, decay=config.probe_decay
    )


def _first_users(users: SequenceBatch, limit: int) -> SequenceBatch:
    if len(users) <= limit:
        return users
    assert users.targets is not None
    kept = np.arange(limit)
    return SequenceBatch(users.user_index[kept], users.items.take(kept), users.targets.take(kept))


def _first_half(users: SequenceBatch, config: ScoreConfig) -> npt.NDArray[np.bool_]:
    """Targets whose user falls into the half that fits the mixture; a user is never in both."""
    users = _first_users(users, config.max_users)
    assert users.targets is not None
    shuffled = np.random.default_rng(config.seed).permutation(len(users))
    is_fit = np.zeros(len(users), dtype=bool)
    is_fit[shuffled[: (len(users) + 1) // 2]] = True
    return is_fit[users.targets.row_ids]


def _open_space(
    dataset: Dataset, config: ScoreConfig, store: ArtifactStore | None
) -> VectorSet | None:
    space = config.space or DEFAULT_SPACE
    if store is not None and config.space is not None:
        return open_space(space, dataset, store)
    if space in dataset.spaces:
        return VectorSet(
            key=dataset.key,
            filesystem=dataset.filesystem,
            files=tuple(dataset.vector_files(space)),
            num_items=dataset.num_items,
            dim=dataset.vector_dim(space),
        )
    logger.warning(
        "dataset %s has no vector space %r: nothing that needs vectors is computed",
        dataset.name,
        space,
    )
    return None


def _sample(vectors: VectorSet, config: ScoreConfig) -> VectorBatch:
    drawn = np.random.default_rng(config.seed).permutation(vectors.num_items)
    items = np.sort(drawn[: config.sample_items])
    return VectorBatch(items, vectors.take(items))


def _hitrate_rows(vectors: VectorSet, users: SequenceBatch, config: ScoreConfig) -> HitrateRows:
    users = _first_users(users, config.hitrate_users)
    assert users.targets is not None
    targets = users.targets
    histories = users.items.tail(config.hitrate_history)
    items = choose_items(
        np.union1d(histories.values, targets.values),
        vectors.num_items,
        limit=config.hitrate_gallery,
        seed=config.seed,
    )
    return HitrateRows(
        histories=histories.take(targets.row_ids),
        targets=targets.values.astype(np.int64),
        row_weight=1.0 / np.repeat(targets.lengths, targets.lengths),
        items=items,
        gallery=raw_gallery(vectors, items, shard_items=config.hitrate_shard),
    )


def _transitions(rows: Sequence[ProbeRows]) -> HeldOutTransitions:
    """Steps from the newest history item to the target."""
    source = np.concatenate([one.items[:, 0] for one in rows])
    target = np.concatenate([one.target for one in rows])
    has_history = np.concatenate([one.weights[:, 0] > 0 for one in rows])
    kept = has_history & (source != target)
    weight = np.concatenate([one.row_weight for one in rows])
    return HeldOutTransitions(source[kept], target[kept], weight[kept])


def _parallel_data(dataset: Dataset, users: SequenceBatch, config: ScoreConfig) -> ParallelData:
    users = _first_users(users, config.parallel.users)
    assert users.targets is not None
    length = config.parallel.history
    batches = dataset.sequence_batches("train", limit=config.max_train_users)
    train = [batch.items.tail(length + 1) for batch in batches]
    return ParallelData(
        train=Ragged.concatenate(train),
        histories=users.items,
        targets=users.targets,
    )


def _ceiling(
    dataset: Dataset,
    rows: HitrateRows,
    split: ScoreSplit,
    config: ScoreConfig,
    store: ArtifactStore | None,
) -> Scores:
    def measure() -> Scores:
        report = rows.measure(rows.gallery, config)
        return {
            "embedding_hitrate_raw": none_if_nan(report.hitrate),
            "embedding_hitrate_k": config.hitrate_k,
            "embedding_hitrate_rows": report.num_rows,
            "embedding_hitrate_gallery": report.gallery_size,
        }

    if store is None:
        return measure()
    parts = {
        name: value
        for name, value in to_mapping(config).items()
        if name.startswith("hitrate_") or name in ("space", "seed")
    }
    artifact = store.build(
        KIND,
        f"{dataset.name}-ceiling",
        {"ceiling": parts, "split": split},
        parents=(dataset.key,),
        produce=lambda _: ArtifactInfo(metrics=measure()),
    )
    return dict(artifact.manifest.metrics)


def none_if_nan(value: Any) -> Any:
    """Turn NaN, which JSON lacks, into None: the metric is undefined."""
    return None if isinstance(value, float) and math.isnan(value) else value
