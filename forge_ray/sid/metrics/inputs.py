"""What SID tables are scored on: bounded samples of one dataset, read once for many tables.

As a sweep's proxy nothing here sees test events: transitions and popularity come from the train
part, embedding hitrate uses validation targets, and the probe's mixture is fitted on one half of
the validation users and scored on the other. The test form (mixture on all validation users, scores
on test) exists to compare with published tables only.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from forge_ray.artifacts import ArtifactInfo, ArtifactStore
from forge_ray.config import to_mapping
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import DEFAULT_SPACE, Dataset, SequenceBatch, VectorBatch
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.backoff import (
    ProbeData,
    ProbeRows,
    count_transitions,
    merge_transitions,
    probe_rows,
)
from forge_ray.sid.metrics.hitrate import HitrateReport, embedding_hitrate

logger = logging.getLogger(__name__)

KIND = "scores"
ScoreSplit = Literal["validation", "test"]
Scores = dict[str, Any]
"""Metric name → number, or text where a number needs its variant named; None where undefined."""


@dataclass(kw_only=True)
class ScoreConfig:
    """How much is read and how the behavioural metrics are computed."""

    space: str | None = None
    """Vector space of the dataset for embedding hitrate; by default the one the SIDs were fitted
    on, and `default` for tables made elsewhere."""
    max_users: int = 50_000
    """Held-out users read for the probe; their standard error is about 0.01 bits at 20,000."""
    max_train_users: int = 200_000
    """Train users whose transitions are counted; about 120 bytes for each of their interactions."""
    hitrate_users: int = 5_000
    """Held-out users read for embedding hitrate, about as many as FORGE's lists."""
    hitrate_k: int = 30
    """Neighbours of each history item, as published."""
    hitrate_history: int = 50
    """Newest history items that search."""
    hitrate_gallery: int = 200_000
    """Most items searched; of larger catalogues the items of the scored lists and a seeded sample
    of the rest (FORGE: about 500,000). Memory 4 bytes for each of D numbers."""
    hitrate_exact_limit: int = 200_000
    """Distinct vectors up to which the search is exact, HNSW beyond."""
    probe_history: int = 5
    """Newest history items the probe conditions on."""
    probe_window: int = 3
    """Largest distance of a counted transition."""
    probe_decay: float = 0.6
    """Weight of one more step, of distance in transitions and of age in histories."""
    probe_steps: int = 60
    """EM steps for the probe's mixture."""
    tail_max_count: int = 5
    """Train interactions up to which a target belongs to the tail."""
    seed: int = 0
    """Fixes the gallery sample, the halves of the validation users and the shuffled control."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in (
            "max_users",
            "max_train_users",
            "hitrate_users",
            "hitrate_k",
            "hitrate_history",
            "hitrate_gallery",
            "probe_history",
            "probe_window",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"score.{name} must be >= 1, got {value}. Raise it.")


@dataclass(frozen=True, eq=False)
class HitrateRows:
    """Held-out lists for embedding hitrate, one row per target."""

    histories: Ragged
    targets: npt.NDArray[np.int64]
    row_weight: npt.NDArray[np.float64]
    gallery: VectorBatch

    def measure(self, vectors: npt.NDArray[np.floating[Any]], config: ScoreConfig) -> HitrateReport:
        """Embedding hitrate of these rows by some vectors of the gallery's items.

        Args:
            vectors: [n, D], row i belonging to `gallery.indices[i]`.
            config: neighbours and search limits.
        """
        return embedding_hitrate(
            vectors,
            self.histories,
            self.targets,
            items=self.gallery.indices,
            k=config.hitrate_k,
            exact_limit=config.hitrate_exact_limit,
            row_weight=self.row_weight,
        )


@dataclass(frozen=True, eq=False)
class ScoreInputs:
    """What all tables of a dataset are scored on; load once, score many."""

    split: ScoreSplit
    probe: ProbeData
    hitrate: HitrateRows | None
    """None for a dataset without the vector space."""
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
    held_out = _read_users(dataset, split, max(config.max_users, config.hitrate_users))
    hitrate = _hitrate_rows(dataset, held_out, config)
    return ScoreInputs(
        split=split,
        probe=_probe_data(dataset, held_out, split, config),
        hitrate=hitrate,
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


def _hitrate_rows(
    dataset: Dataset, users: SequenceBatch, config: ScoreConfig
) -> HitrateRows | None:
    space = config.space or DEFAULT_SPACE
    if space not in dataset.spaces:
        logger.warning(
            "dataset %s has no vector space %r: embedding hitrate is not computed",
            dataset.name,
            space,
        )
        return None
    users = _first_users(users, config.hitrate_users)
    assert users.targets is not None
    targets = users.targets
    histories = users.items.tail(config.hitrate_history)
    listed = np.union1d(histories.values, targets.values)
    return HitrateRows(
        histories=histories.take(targets.row_ids),
        targets=targets.values.astype(np.int64),
        row_weight=1.0 / np.repeat(targets.lengths, targets.lengths),
        gallery=_gallery(dataset, listed, space, config),
    )


def _gallery(
    dataset: Dataset, listed: npt.NDArray[np.integer[Any]], space: str, config: ScoreConfig
) -> VectorBatch:
    """Vectors of the searched items, in index order; 9 bytes per catalogue item beside them.

    A uniform sample of a large catalogue would miss nearly every target, so the listed items come
    first and the sample fills the rest.
    """
    rng = np.random.default_rng(config.seed)
    limit = min(config.hitrate_gallery, dataset.num_items)
    is_chosen = np.zeros(dataset.num_items, dtype=bool)
    is_chosen[_draw(listed, limit, rng)] = True
    is_chosen[_draw(np.flatnonzero(~is_chosen), limit - int(is_chosen.sum()), rng)] = True
    indices = np.flatnonzero(is_chosen)
    vectors = np.empty((limit, dataset.vector_dim(space)), dtype=np.float32)
    for batch in dataset.vector_batches(space=space):
        kept = is_chosen[batch.indices]
        vectors[np.searchsorted(indices, batch.indices[kept])] = batch.vectors[kept]
    return VectorBatch(indices, vectors)


def _draw(
    items: npt.NDArray[np.integer[Any]], limit: int, rng: np.random.Generator
) -> npt.NDArray[np.integer[Any]]:
    if len(items) <= limit:
        return items
    return items[rng.choice(len(items), size=limit, replace=False, shuffle=False)]


def _ceiling(
    dataset: Dataset,
    rows: HitrateRows,
    split: ScoreSplit,
    config: ScoreConfig,
    store: ArtifactStore | None,
) -> Scores:
    def measure() -> Scores:
        report = rows.measure(rows.gallery.vectors, config)
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
