"""BM25 against its formula, its order of equal scores, and what it refuses."""

from __future__ import annotations

import math
import tracemalloc

import bm25s
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.queries.text import words
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.evaluate import bm25 as module
from forge_ray.evaluate.bm25 import Bm25, Bm25Ranker
from forge_ray.evaluate.popularity import fill_popular, popularity_order

TEXTS = ["Toy Story", "The Matrix", "Toy Soldiers: a toy war", None, "Matrix, the sequel", "Heat"]
COUNTS = np.array([3, 9, 4, 50, 20, 1])


def plain_scores(query: str) -> list[float]:
    """Lucene's BM25, k1 = 1.5, b = 0.75, document by document."""
    documents = [words(text or "") for text in TEXTS]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in words(query):
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = document.count(word)
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["toy", "the matrix", "sequel matrix toy", "heat heat"])
def test_items_stand_in_the_order_of_the_formula(query):
    bm25 = Bm25.fit(TEXTS, COUNTS)
    (found,) = bm25.recommend(Ragged.from_lists([[]], dtype=np.int32), [query], 6)
    scores = plain_scores(query)
    expected = sorted(range(6), key=lambda item: (-round(scores[item], 5), -COUNTS[item]))
    assert found.tolist() == expected


class OneByOne:
    """What `recommend` computes, query by query, with the scores of `bm25s` itself."""

    def __init__(self, texts: list[str | None], counts: npt.NDArray[np.int64]) -> None:
        self.order = popularity_order(counts)
        self.index = bm25s.BM25()
        documents = [words(texts[item] or "") for item in self.order.tolist()]
        self.index.index(documents, show_progress=False)

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        asked = words(query)
        return self.index.get_scores(asked) if asked else np.zeros(len(self.order), np.float32)

    def recommend(self, histories: Ragged, queries: list[str], k: int) -> npt.NDArray[np.int64]:
        found = np.full((len(queries), k), -1, dtype=np.int64)
        for row, query in enumerate(queries):
            scores = self.scores(query)
            matching = np.flatnonzero(scores > 0)
            items = self.order[matching[np.argsort(-scores[matching], kind="stable")]]
            fresh = items[~np.isin(items, histories.row(row))]
            found[row, : min(k, len(fresh))] = fresh[:k]
        return fill_popular(found, histories, self.order)


WORDS = st.sampled_from(["red", "soap", "cup", "a", "of", "Toy", "никто", "红色连衣裙"])
PHRASES = st.lists(WORDS, max_size=6).map(" ".join)


@settings(max_examples=60)
@given(st.data())
def test_batches_score_and_order_as_one_query_at_a_time(data):
    texts = [*data.draw(st.lists(PHRASES | st.none(), max_size=12)), "red soap"]
    counts = np.array([data.draw(st.integers(0, 3)) for _ in texts])
    queries = data.draw(st.lists(PHRASES | st.just("unheard of"), min_size=1, max_size=8))
    seen = [data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=4)) for _ in queries]
    histories, k = Ragged.from_lists(seen, dtype=np.int32), data.draw(st.integers(1, 15))
    bm25, expected = Bm25.fit(texts, counts), OneByOne(texts, counts)
    scores = bm25._scores(bm25._known_words(queries)).toarray()
    assert scores.dtype == np.float32
    assert np.array_equal(scores, np.stack([expected.scores(query) for query in queries]))
    nothing = histories.head(0)
    for block in (1, 5, module._BLOCK_MATCHES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK_MATCHES", block)
            found = bm25.recommend(histories, queries, k)
            whole = bm25.recommend(histories, queries, k, exclude_seen=False)
        assert found.tolist() == expected.recommend(histories, queries, k).tolist()
        assert whole.tolist() == expected.recommend(nothing, queries, k).tolist()


@settings(max_examples=60)
@given(st.lists(PHRASES | st.none(), max_size=20), st.integers(1, 7))
def test_the_index_is_that_of_the_library(texts, size):
    texts = [*texts, "red soap"]
    counts = np.arange(len(texts)) % 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ITEMS", size)
        bm25 = Bm25.fit(texts, counts)
    known = {word for text in texts for word in words(text or "")}
    assert set(bm25.vocabulary) == known
    expected = OneByOne(texts, counts)
    for word, row in bm25.vocabulary.items():
        assert bm25.scores[[row]].toarray()[0].tolist() == expected.scores(word).tolist()
    assert bm25.scores.has_sorted_indices
    assert bm25.scores.data.dtype == np.float32


def test_the_index_is_made_of_little_more_than_it_keeps(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ITEMS", 256)
    draws = np.random.default_rng(0).zipf(1.3, (6000, 10)).clip(max=500)
    texts = [" ".join(f"w{word}" for word in row) for row in draws.tolist()]
    tracemalloc.start()
    try:
        bm25 = Bm25.fit(texts, np.zeros(len(texts), np.int64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kept = sum(part.nbytes for part in (bm25.scores.data, bm25.scores.indices, bm25.order))
    assert peak < 4 * kept


def test_any_part_of_a_title_without_spaces_finds_it():
    texts = ["红色连衣裙夏季新款", "蓝色牛仔裤", "苹果手机壳", "東京タワー", "กระเป๋าหนัง"]
    bm25 = Bm25.fit(texts, np.array([0, 1, 2, 3, 4]))
    queries = ["连衣裙", "牛仔", "手机壳", "タワー", "หนัง"]
    lists = bm25.recommend(Ragged.from_lists([[]] * 5, dtype=np.int32), queries, 1)
    assert lists[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_blocks_are_as_many_queries_as_have_so_many_matches(monkeypatch):
    bm25 = Bm25.fit(TEXTS, COUNTS)
    monkeypatch.setattr(module, "_BLOCK_MATCHES", 4)
    asked = bm25._known_words(["toy", "toy", "matrix the", "heat", "?", "toy toy toy"])
    # By falling matches, of which a block has at most four but where one query has more.
    assert [rows.tolist() for rows in bm25._blocks(asked)] == [[5], [2], [0, 1], [3, 4]]


def test_equal_scores_and_strangers_stand_by_popularity():
    texts = ["red soap", "red hat", "red cup", "blue"]
    bm25 = Bm25.fit(texts, np.array([1, 7, 3, 9]))
    nothing = Ragged.from_lists([[], []], dtype=np.int32)
    lists = bm25.recommend(nothing, ["red", "green"], 4)
    assert lists.tolist() == [[1, 2, 0, 3], [3, 1, 2, 0]]


def test_seen_items_stay_out_unless_wanted():
    bm25 = Bm25.fit(TEXTS, COUNTS)
    seen = Ragged.from_lists([[0]], dtype=np.int32)
    assert 0 not in bm25.recommend(seen, ["toy"], 6)[0]
    assert bm25.recommend(seen, ["toy"], 6, exclude_seen=False)[0, 0] in (0, 2)


def test_a_query_of_no_word_is_popularity():
    bm25 = Bm25.fit(TEXTS, COUNTS)
    (found,) = bm25.recommend(Ragged.from_lists([[]], dtype=np.int32), ["?"], 3)
    assert found.tolist() == [3, 4, 1]


def test_targets_are_found_in_the_lists():
    ranker = Bm25Ranker(Bm25.fit(TEXTS, COUNTS), [1, 3], exclude_seen=True)
    histories = Ragged.from_lists([[], []], dtype=np.int32)
    wanted = Ragged.from_lists([[5], [5]], dtype=np.int32)
    found = ranker.rank(histories, wanted, ["heat", "toy"])
    assert found.places.metrics([1])["ItemHit@1"].tolist() == [1.0, 0.0]
    with pytest.raises(ConfigError, match="--queries"):
        ranker.rank(histories, wanted)


def test_texts_without_words_are_refused():
    with pytest.raises(ConfigError, match="items with words"):
        Bm25.fit([None, "?"], np.array([1, 1]))
