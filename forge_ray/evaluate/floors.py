"""Baselines that rank items without SIDs, as rows of the table; popularity and item-kNN.

The two floors (popularity and item-kNN with stated constants) stand beside every model; what is
tuned looks at validation targets only. Fitting streams the train part once and holds item-to-item
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import from_mapping, to_mapping
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset, Split, Users
from forge_ray.evaluate.board import Ranked
from forge_ray.evaluate.config import EvaluationConfig
from forge_ray.evaluate.evaluator import Evaluation, Ready, evaluated
from forge_ray.evaluate.item_knn import (
    GRID,
    MAX_LENGTHS,
    ItemKnn,
    ItemKnnConfig,
    blocks_of_pairs,
    count_items,
    tune,
)
from forge_ray.evaluate.popularity import Popularity, popularity_order
from forge_ray.evaluate.ranking import distinct_items, list_places

BASELINE_KIND = "baseline"
_TUNING_USERS = 2000
_TUNING_CUT = 10


class Recommender(Protocol):
    """Lists items for users."""

    def recommend(
        self, histories: Ragged, k: int, *, exclude_seen: bool = True
    ) -> npt.NDArray[np.int64]:
        """The k best items of each of U users, int64 [U, k], −1 behind the last one."""


@dataclass(frozen=True)
class ListRanker:
    """A recommender of items as a ranker."""

    recommender: Recommender
    ks: Sequence[int]
    exclude_seen: bool

    def rank(
        self, histories: Ragged, targets: Ragged, queries: Sequence[str] | None = None
    ) -> Ranked:
        """List items for some users and find their targets.

        Args:
            histories: U rows of item indices.
            targets: U rows of distinct held-out items, at least one each.
            queries: not read.
        """
        started = perf_counter()
        lists = self.recommender.recommend(histories, max(self.ks), exclude_seen=self.exclude_seen)
        seconds = perf_counter() - started
        return Ranked(list_places(lists, targets, self.ks), lists, seconds=seconds)


def evaluate_floors(
    dataset: Dataset, split: Split, ks: Sequence[int], store: ArtifactStore
) -> dict[str, dict[str, float]]:
    """Item-level figures of both floors on all users of a split, computed once per dataset.

    Args:
        dataset: a prepared dataset.
        split: `validation` or `test`.
        ks: cut-offs.
        store: where the results are kept, as artifacts of kind `evaluation`.

    Returns:
        `popularity` and `item_knn`, each as in `Board.summary`.
    """
    config = EvaluationConfig(split=split, ks=sorted(set(ks)))
    popularity = evaluate_popularity(dataset, config, store)
    item_knn = evaluate_item_knn(dataset, config, ItemKnnConfig(), store)
    return {"popularity": popularity.metrics, "item_knn": item_knn.metrics}


def evaluate_popularity(
    dataset: Dataset,
    config: EvaluationConfig,
    store: ArtifactStore,
    *,
    users: Users | None = None,
) -> Evaluation:
    """Figures of the popularity floor.

    Args:
        dataset: a prepared dataset.
        config: which users and how.
        store: keeps the result.
        users: a query set of the dataset, to rank for its rows instead.
    """

    def fit() -> Recommender:
        return Popularity(popularity_order(dataset.train_counts()))

    return evaluate_lists("popularity", fit, users or dataset, config, store, identity={})


def evaluate_item_knn(
    dataset: Dataset,
    config: EvaluationConfig,
    knn: ItemKnnConfig,
    store: ArtifactStore,
    *,
    users: Users | None = None,
) -> Evaluation:
    """Figures of item-kNN.

    Args:
        dataset: a prepared dataset.
        config: which users and how.
        knn: how items vote.
        store: keeps the result.
        users: a query set of the dataset, to rank for its rows instead.
    """
    return evaluate_lists(
        "item_knn",
        lambda: fit_item_knn(dataset, knn),
        users or dataset,
        config,
        store,
        identity=to_mapping(knn),
    )


def evaluate_lists(
    name: str,
    fit: Callable[[], Recommender],
    users: Users,
    config: EvaluationConfig,
    store: ArtifactStore,
    *,
    identity: Mapping[str, Any],
    parents: Sequence[str] = (),
) -> Evaluation:
    """Figures of a recommender of items, from the store when they were computed before.

    Args:
        name: of the baseline.
        fit: makes the recommender; called where the figures are new. Picklable results only.
        users: a prepared dataset, or a query set.
        config: which users and how; with more than one worker Ray must be up.
        store: keeps the result.
        identity: what decides the recommender beside the users, JSON types.
        parents: keys of artifacts that it was made from.
    """
    return evaluated(
        name,
        lambda: Ready(ListRanker(fit(), config.ks, config.exclude_seen)),
        users,
        config,
        identity={"baseline": name, **identity},
        parents=parents,
        store=store,
    )


def fit_item_knn(dataset: Dataset, config: ItemKnnConfig) -> ItemKnn:
    """Count on the train part.

    Memory: 12 bytes for each distinct pair of items of one user, twice while a block is added.

    Args:
        dataset: a prepared dataset.
        config: how items vote.
    """
    counts = reduce(
        add,
        (
            count_items(block, dataset.num_items, max_length=config.max_length)
            for batch in dataset.sequence_batches("train")
            for block in blocks_of_pairs(batch.items, max_length=config.max_length)
        ),
    )
    return ItemKnn.fit(counts, dataset.train_counts(), config)


def tuned_item_knn(
    dataset: Dataset, store: ArtifactStore, *, exclude_seen: bool = True
) -> ItemKnnConfig:
    """The constants of item-kNN that rank the validation targets best, by ItemNDCG@10.

    Args:
        dataset: a prepared dataset; its first 2,000 validation users are looked at.
        store: keeps the constants, as an artifact of kind `baseline`.
        exclude_seen: whether the lists that they are meant for leave items of the history out.
    """

    def produce(_: ArtifactWriter) -> ArtifactInfo:
        figure = validation_figure(dataset, users=_TUNING_USERS, exclude_seen=exclude_seen)
        starts = (fit_item_knn(dataset, ItemKnnConfig(max_length=one)) for one in MAX_LENGTHS)
        best = tune(starts, figure)
        return ArtifactInfo(metrics={"item_knn": to_mapping(best)})

    grid = {**GRID, "max_length": MAX_LENGTHS}
    content = {"kind": "item_knn", "users": _TUNING_USERS, "grid": _lists(grid)}
    if not exclude_seen:
        content["exclude_seen"] = False
    artifact = store.build(
        BASELINE_KIND,
        f"{dataset.name}-item_knn",
        content,
        parents=(dataset.key,),
        produce=produce,
    )
    return from_mapping(ItemKnnConfig, artifact.manifest.metrics["item_knn"])


def _lists(grid: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: list(values) for name, values in grid.items()}


def validation_figure(
    dataset: Dataset, *, users: int, exclude_seen: bool = True
) -> Callable[[Recommender], float]:
    """What decides between settings of a baseline: ItemNDCG@10 of some validation users.

    Args:
        dataset: a prepared dataset.
        users: the first so many validation users, a fixed random sample, are held in memory.
        exclude_seen: whether items of the history are kept out of the lists.
    """
    batches = list(dataset.sequence_batches("validation", limit=users))
    histories = Ragged.concatenate([batch.items for batch in batches])
    targets = Ragged.concatenate([batch.targets for batch in batches if batch.targets is not None])
    wanted = distinct_items(targets, dataset.num_items)

    def figure(recommender: Recommender) -> float:
        lists = recommender.recommend(histories, _TUNING_CUT, exclude_seen=exclude_seen)
        found = list_places(lists, wanted, [_TUNING_CUT]).metrics([_TUNING_CUT])
        return float(found[f"ItemNDCG@{_TUNING_CUT}"].mean())

    return figure
