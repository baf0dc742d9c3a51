"""BM25 against its formula, its order of equal scores, and what it refuses."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.evaluate.bm25 import Bm25, Bm25Ranker, words

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


def test_the_missing_library_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "bm25s":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"forge-ray\[search\]"):
        Bm25.fit(TEXTS, COUNTS)
