"""The floor of search: BM25 over the items' texts; it reads queries and no histories.

Equal scores are ordered by train count, then item index. Items without a word of the query follow
by popularity, as in every baseline whose lists come out short.

Source: Robertson and Zaragoza 2009, as the library `bm25s` has it (arXiv 2407.03618), with its
constants k1 = 1.5 and b = 0.75. Words are runs of letters and digits in lower case; none is left
out and none is stemmed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.evaluate.board import Ranked
from forge_ray.evaluate.config import EvaluationConfig
from forge_ray.evaluate.evaluator import Evaluation, Ready, evaluated
from forge_ray.evaluate.popularity import fill_popular, popularity_order
from forge_ray.evaluate.ranking import list_places

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Words of a text."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Bm25:
    """An index over the items' texts.

    Attributes:
        index: of `bm25s`; its documents are the items in the order of `order`.
        order: int64 [N], most popular first.
    """

    index: Any
    order: npt.NDArray[np.int64]

    @classmethod
    def fit(cls, texts: Sequence[str | None], train_counts: npt.NDArray[np.int64]) -> Bm25:
        """Index the texts.

        Args:
            texts: of the items [N].
            train_counts: train interactions of each item [N].

        Raises:
            ConfigError: the library is not installed, or there is no word.
        """
        try:
            import bm25s
        except ImportError as error:
            raise ConfigError(
                "bm25 must have the library bm25s, got none. Run pip install 'forge-ray[search]'."
            ) from error
        order = popularity_order(train_counts)
        documents = [words(texts[item] or "") for item in order.tolist()]
        if not any(documents):
            raise ConfigError(
                "bm25 must have items with words, got none. Name another column of the items."
            )
        index = bm25s.BM25()
        index.index(documents, show_progress=False)
        return cls(index, order)

    def recommend(
        self,
        histories: Ragged,
        queries: Sequence[str],
        k: int,
        *,
        exclude_seen: bool = True,
    ) -> npt.NDArray[np.int64]:
        """List the k best items for each query.

        Args:
            histories: items of each user, U rows; only to leave them out.
            queries: U texts.
            k: length of the lists.
            exclude_seen: whether items of the history are kept out.

        Returns:
            int64 [U, k], −1 where the catalogue is exhausted.
        """
        hidden = histories if exclude_seen else histories.head(0)
        found = np.full((len(queries), k), -1, dtype=np.int64)
        for row, query in enumerate(queries):
            items = self._matching(query)
            fresh = items[~np.isin(items, hidden.row(row))] if exclude_seen else items
            found[row, : min(k, len(fresh))] = fresh[:k]
        return fill_popular(found, hidden, self.order)

    def _matching(self, query: str) -> npt.NDArray[np.int64]:
        """Items with a word of the query, best first."""
        asked = words(query)
        if not asked:
            return self.order[:0]
        scores = self.index.get_scores(asked)
        matching = np.flatnonzero(scores > 0)
        # Documents stand in the order of popularity, and the sort is stable.
        return self.order[matching[np.argsort(-scores[matching], kind="stable")]]


@dataclass(frozen=True)
class Bm25Ranker:
    """BM25 as a ranker; see `forge_ray.evaluate.evaluator.Ranker`."""

    bm25: Bm25
    ks: Sequence[int]
    exclude_seen: bool

    def rank(
        self, histories: Ragged, targets: Ragged, queries: Sequence[str] | None = None
    ) -> Ranked:
        """List items for some queries and find the targets.

        Args:
            histories: U rows of item indices.
            targets: U rows of distinct held-out items, at least one each.
            queries: U texts.

        Raises:
            ConfigError: there are none.
        """
        if queries is None:
            raise ConfigError(
                "bm25 must rank for a query set, got users without queries. Pass --queries."
            )
        started = perf_counter()
        lists = self.bm25.recommend(
            histories, queries, max(self.ks), exclude_seen=self.exclude_seen
        )
        seconds = perf_counter() - started
        return Ranked(list_places(lists, targets, self.ks), lists, seconds=seconds)


def evaluate_bm25(
    queries: QuerySet, config: EvaluationConfig, store: ArtifactStore, *, column: str
) -> Evaluation:
    """Figures of BM25 on a query set, from the store when they were computed before.

    Args:
        queries: what is asked.
        config: which rows and how.
        store: keeps the result.
        column: of the items, the text that is searched.
    """
    return evaluated(
        "bm25",
        lambda: Ready(
            Bm25Ranker(fit_bm25(queries.dataset, column), config.ks, config.exclude_seen)
        ),
        queries,
        config,
        identity={"baseline": "bm25", "column": column},
        parents=(queries.dataset.key,),
        store=store,
    )


def fit_bm25(dataset: Dataset, column: str) -> Bm25:
    """Index a column of a dataset's items.

    Raises:
        ConfigError: there is no such column.
    """
    columns = dataset.item_columns()
    if column not in columns:
        raise ConfigError(
            f"bm25 must search a column of the items of {dataset.name}, got {column!r}. There are "
            f"{', '.join(columns)}."
        )
    texts = dataset.items([column])[column].cast(pa.string()).to_pylist()
    return Bm25.fit(texts, dataset.train_counts())
