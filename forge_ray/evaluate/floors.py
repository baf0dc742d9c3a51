"""The floors that stand beside every model: popularity and item-kNN on one split, cached.

Streams the train part once to count and the held-out part once to score; holds item-to-item counts
and one block of users.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter, timed
from forge_ray.config import to_mapping
from forge_ray.data.schema import SPLITS, Dataset, SequenceBatch, Split
from forge_ray.errors import ConfigError
from forge_ray.evaluate.item_knn import ItemKnn, count_items
from forge_ray.evaluate.popularity import popularity_order, recommend_popular
from forge_ray.evaluate.ranking import MetricTotals, distinct_items, ranked_metrics, tail_slices

logger = logging.getLogger(__name__)

KIND = "floors"
DEFAULT_KS = (5, 10, 20, 100)


@dataclass(kw_only=True)
class FloorsConfig:
    """What the floors are measured on and how item-kNN votes."""

    split: str = "validation"
    """`validation`, or `test` when a sweep is finalised."""
    ks: list[int] = field(default_factory=lambda: list(DEFAULT_KS))
    """Cut-offs."""
    history: int = 10
    """Newest history items that vote in item-kNN."""
    decay: float = 0.7
    """Weight of one more step of age in item-kNN."""
    max_length: int = 60
    """Train items above which a user is left out of the co-occurrences."""
    tail_max_count: int = 5
    """Train interactions up to which an item belongs to the tail."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.split not in SPLITS[1:]:
            raise ConfigError(
                f"floors.split must be validation or test, got {self.split!r}. Name one of them."
            )
        if not self.ks or min(self.ks) < 1:
            raise ConfigError(f"floors.ks must be cut-offs >= 1, got {self.ks}. Use 5,10,20,100.")


def evaluate_floors(
    dataset: Dataset,
    split: Split,
    ks: Sequence[int],
    store: ArtifactStore,
) -> dict[str, dict[str, float]]:
    """Item-level metrics of both floors on all users of a split, computed once per dataset.

    Args:
        dataset: a prepared dataset.
        split: `validation` or `test`.
        ks: cut-offs.
        store: where the result is kept, as an artifact of kind `floors`.

    Returns:
        `popularity` and `item_knn`, each with `ItemHit@k`, `ItemNDCG@k`, their `_se`, `/head`
        and `/tail` forms, `coverage@k` and `users`; see `ranking.MetricTotals.summary`.
    """
    config = FloorsConfig(split=split, ks=sorted(set(ks)))

    def produce(_: ArtifactWriter) -> ArtifactInfo:
        metrics: dict[str, Any] = {}
        with timed(metrics, "seconds"):
            metrics.update(measure_floors(dataset, config))
        return ArtifactInfo(metrics=metrics)

    artifact = store.build(
        KIND,
        f"{dataset.name}-{split}",
        to_mapping(config),
        parents=(dataset.key,),
        produce=produce,
    )
    found: Mapping[str, Any] = artifact.manifest.metrics
    return {name: dict(found[name]) for name in ("popularity", "item_knn")}


def measure_floors(dataset: Dataset, config: FloorsConfig) -> dict[str, dict[str, float]]:
    """Compute both floors; `evaluate_floors` caches this.

    Args:
        dataset: a prepared dataset.
        config: split, cut-offs and the kNN's constants.
    """
    train_counts = dataset.train_counts()
    knn = _fit_knn(dataset, train_counts, config)
    depth = max(config.ks)
    boards = {name: _Board(dataset.num_items, config) for name in ("popularity", "item_knn")}
    order = popularity_order(train_counts)
    split: Any = config.split
    for batch in dataset.sequence_batches(split, batch_rows=16_384):
        boards["popularity"].add(batch, recommend_popular(batch.items, order, depth), train_counts)
        boards["item_knn"].add(batch, knn.recommend(batch.items, depth), train_counts)
    return {name: board.summary() for name, board in boards.items()}


def _fit_knn(
    dataset: Dataset, train_counts: npt.NDArray[np.int64], config: FloorsConfig
) -> ItemKnn:
    counts = reduce(
        add,
        (
            count_items(batch.items, dataset.num_items, max_length=config.max_length)
            for batch in dataset.sequence_batches("train")
        ),
    )
    return ItemKnn.fit(counts, train_counts, history=config.history, decay=config.decay)


class _Board:
    """Running metrics of one floor."""

    totals: MetricTotals
    shown: npt.NDArray[np.bool_]
    """[len(ks), N] whether an item was listed within each cut-off."""

    def __init__(self, num_items: int, config: FloorsConfig) -> None:
        self.totals = MetricTotals()
        self.ks = config.ks
        self.tail_max_count = config.tail_max_count
        self.shown = np.zeros((len(config.ks), num_items), dtype=bool)

    def add(
        self,
        batch: SequenceBatch,
        lists: npt.NDArray[np.int64],
        train_counts: npt.NDArray[np.int64],
    ) -> None:
        """Score the lists of one batch of users."""
        assert batch.targets is not None  # held-out splits always have targets
        wanted = distinct_items(batch.targets, len(train_counts))
        slices = tail_slices(wanted, train_counts, tail_max_count=self.tail_max_count)
        self.totals.add(ranked_metrics(lists, wanted, self.ks), slices)
        for row, k in enumerate(self.ks):
            top = lists[:, :k]
            self.shown[row, top[top >= 0]] = True

    def summary(self) -> dict[str, float]:
        """Means over all users, and coverage."""
        covered = {
            f"coverage@{k}": float(share)
            for k, share in zip(self.ks, self.shown.mean(axis=1), strict=True)
        }
        return self.totals.summary() | covered
