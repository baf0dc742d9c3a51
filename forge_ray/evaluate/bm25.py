"""The floor of search: BM25 over the items' texts; it reads queries and no histories.

Equal scores are ordered by train count, then item index. Items without a word of the query follow
by popularity, as in every baseline whose lists come out short.

Source: Robertson and Zaragoza 2009, as Lucene and the library `bm25s` have it (arXiv 2407.03618),
with their constants k1 = 1.5 and b = 0.75; scores are bit by bit those of `bm25s`. Words are those
of `data.queries.text.words`; none is left out and none is stemmed.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as sp

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.queries.text import words
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.data.sorted_arrays import is_member
from forge_ray.errors import ConfigError
from forge_ray.evaluate.board import Ranked
from forge_ray.evaluate.config import EvaluationConfig
from forge_ray.evaluate.evaluator import Evaluation, Ready, evaluated
from forge_ray.evaluate.popularity import fill_popular, popularity_order
from forge_ray.evaluate.ranking import list_places

_K1, _B = 1.5, 0.75
_WORDS_VERSION = 2
"""2: scripts without spaces in pairs of characters."""
_BLOCK_ITEMS = 4096
"""Texts whose words are in memory at a time."""
_BLOCK_MATCHES = 1 << 20
"""Scored pairs of query and item at a time: 60 MB."""
_NOTHING = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Bm25:
    """An index over the items' texts.

    Memory: 8 bytes for each distinct word of each item, and the vocabulary.

    Attributes:
        vocabulary: row of `scores` by word.
        scores: csr [V, N] float32, what a word is worth to an item; columns are the items in the
            order of `order`.
        order: int64 [N], most popular first.
    """

    vocabulary: Mapping[str, int]
    scores: Any
    order: npt.NDArray[np.int64]

    @classmethod
    def fit(cls, texts: Sequence[str | None], train_counts: npt.NDArray[np.int64]) -> Bm25:
        """Index the texts.

        Memory beside the texts: 16 bytes for each distinct word of each item, twice what is kept,
        the vocabulary, and the words of `_BLOCK_ITEMS` texts.

        Args:
            texts: of the items [N].
            train_counts: train interactions of each item [N].

        Raises:
            ConfigError: there is no word.
        """
        order = popularity_order(train_counts)
        vocabulary: dict[str, int] = {}
        blocks = [
            _Counts.of(
                [texts[item] for item in order[start : start + _BLOCK_ITEMS].tolist()], vocabulary
            )
            for start in range(0, len(order), _BLOCK_ITEMS)
        ]
        if not vocabulary:
            raise ConfigError(
                "bm25 must have items with words, got none. Name another column of the items."
            )
        return cls(vocabulary, _scored(blocks, len(vocabulary)), order)

    def recommend(
        self,
        histories: Ragged,
        queries: Sequence[str],
        k: int,
        *,
        exclude_seen: bool = True,
    ) -> npt.NDArray[np.int64]:
        """List the k best items for each query.

        Memory: 20 bytes an item, and about 60 for each match of as many queries as have a million
        of them together, or of the one query that has more.

        Args:
            histories: items of each user, U rows; only to leave them out.
            queries: U texts.
            k: length of the lists.
            exclude_seen: whether items of the history are kept out.

        Returns:
            int64 [U, k], −1 where the catalogue is exhausted.
        """
        hidden = histories if exclude_seen else histories.head(0)
        # Columns stand in the order of popularity, so that equal scores do too.
        column = np.empty_like(self.order)
        column[self.order] = np.arange(len(self.order))
        lists = np.full((len(queries), k), -1, dtype=np.int64)
        asked = self._known_words(queries)
        for rows in self._blocks(asked):
            block, seen = asked.take(rows), hidden.take(rows)
            best = _best_columns(self._scores(block), Ragged(column[seen.values], seen.offsets), k)
            found = np.where(best < 0, -1, self.order[best])
            lists[rows] = fill_popular(found, seen, self.order)
        return lists

    def _known_words(self, queries: Sequence[str]) -> Ragged:
        """Words of each query as rows of `scores`, in their order and as often as they stand."""
        vocabulary = self.vocabulary
        known = ([vocabulary[one] for one in words(text) if one in vocabulary] for text in queries)
        return Ragged.from_lists(known, dtype=np.int64)

    def _blocks(self, asked: Ragged) -> Iterator[npt.NDArray[np.int64]]:
        """Rows of queries with as many matches as each other, in all at most `_BLOCK_MATCHES`."""
        holding = np.concatenate([[0], np.cumsum(np.diff(self.scores.indptr)[asked.values])])
        matches = np.minimum(np.diff(holding[asked.offsets]), len(self.order))
        order = np.argsort(-matches, kind="stable")
        start = 0
        while start < len(order):
            count = max(1, _BLOCK_MATCHES // max(1, int(matches[order[start]])))
            yield order[start : start + count]
            start += count

    def _scores(self, asked: Ragged) -> Any:
        """Scores csr [U, N], each the sum over the words in their order; indices are not sorted."""
        ones = np.ones(len(asked.values), dtype=np.float32)
        shape = (len(asked), self.scores.shape[0])
        return sp.csr_array((ones, asked.values, asked.offsets), shape=shape) @ self.scores


@dataclass(frozen=True, slots=True)
class _Counts:
    """Words of some items, each once, item after item.

    Attributes:
        lengths: int64 [n], words of each item as often as they stand.
        sizes: int64 [n], distinct words of each item.
        words: int32 [P], rows of the scores.
        counts: float32 [P], how often each stands in its item.
    """

    lengths: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    words: npt.NDArray[np.int32]
    counts: npt.NDArray[np.float32]

    @classmethod
    def of(cls, texts: Sequence[str | None], vocabulary: dict[str, int]) -> _Counts:
        """Count the words of the texts [n]; new ones join the vocabulary."""
        lengths = np.zeros(len(texts), np.int64)
        found = array("i")
        for row, text in enumerate(texts):
            before = len(found)
            found.extend(vocabulary.setdefault(one, len(vocabulary)) for one in words(text or ""))
            lengths[row] = len(found) - before
        owner = np.repeat(np.arange(len(texts)), lengths)
        width = max(1, len(vocabulary))
        pairs, counts = np.unique(owner * width + np.asarray(found), return_counts=True)
        sizes = np.bincount(pairs // width, minlength=len(texts))
        return cls(lengths, sizes, (pairs % width).astype(np.int32), counts.astype(np.float32))


def _scored(blocks: Sequence[_Counts], num_words: int) -> Any:
    """What words are worth to items, csr [V, N] float32."""
    lengths = np.concatenate([block.lengths for block in blocks])
    sizes = np.concatenate([block.sizes for block in blocks])
    holding = np.zeros(num_words, np.int64)
    for block in blocks:
        np.add.at(holding, block.words, 1)
    rarity, mean = _rarity(holding, len(lengths)), lengths.mean()
    for block in blocks:
        # In the place of the counts, and in the order of operations of `bm25s`.
        norms = np.repeat(_K1 * ((1 - _B) + _B * block.lengths / mean), block.sizes)
        block.counts[:] = rarity[block.words] * (block.counts / (norms + block.counts))
    by_item = (
        np.concatenate([block.counts for block in blocks]),
        np.concatenate([block.words for block in blocks]),
        np.concatenate([[0], np.cumsum(sizes)]),
    )
    return sp.csr_array(by_item, shape=(len(lengths), num_words)).T.tocsr()


def _rarity(holding: npt.NDArray[np.int64], num_items: int) -> npt.NDArray[np.float32]:
    """Inverse document frequency of words that so many items hold [V], never negative."""
    numbers, places = np.unique(holding, return_inverse=True)
    # Not NumPy's logarithm: it may differ in the last bit.
    logs = [math.log(1 + (num_items - one + 0.5) / (one + 0.5)) for one in numbers.tolist()]
    return np.array(logs, np.float32)[places]


def _best_columns(scores: Any, seen: Ragged, k: int) -> npt.NDArray[np.int64]:
    """Columns of the k largest positive entries of each row outside `seen`, −1 behind the last.

    Args:
        scores: csr [U, N] float32; of equal scores the lower column comes first.
        seen: columns to leave out, U rows.
        k: length of the lists.
    """
    num_rows, num_columns = scores.shape
    sizes = np.diff(scores.indptr)
    rows = np.repeat(np.arange(num_rows), sizes)
    # Positive floats order like their bits, so one integer orders by falling score, then column.
    falling = np.uint64(0xFFFFFFFF) - scores.data.view(np.uint32)
    keys = (falling << np.uint64(32)) | scores.indices.astype(np.uint64)
    width = int(sizes.max(initial=0))
    padded = np.full((num_rows, max(width, k)), _NOTHING)
    padded[rows, np.arange(len(keys)) - scores.indptr[rows]] = np.where(
        scores.data > 0, keys, _NOTHING
    )
    top = k + int(seen.lengths.max(initial=0))
    if top < width:
        padded = np.partition(padded, top - 1, axis=1)[:, :top]
    columns = (padded & np.uint64(0xFFFFFFFF)).astype(np.int64)
    blocked = np.unique(seen.row_ids * num_columns + seen.values)
    is_seen = is_member(np.arange(num_rows)[:, None] * num_columns + columns, blocked)
    padded[is_seen] = _NOTHING
    padded.sort(axis=1)
    best = padded[:, :k]
    return np.where(best == _NOTHING, -1, (best & np.uint64(0xFFFFFFFF)).astype(np.int64))


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
        identity={"baseline": "bm25", "column": column, "words": _WORDS_VERSION},
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
