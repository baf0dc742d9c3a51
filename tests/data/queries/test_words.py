"""Queries made from texts: what they may hold, and that no row depends on another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data.queries import words as module
from forge_ray.data.queries.text import words as words_of
from forge_ray.data.queries.words import DeriveConfig, QueryMaker
from forge_ray.errors import ConfigError

LEON = "Léon: The Professional"
TEXTS = ["Toy Story (1995)", "Matrix, The (1999)", "(500)", None, "", "?!", LEON]
ITEMS = np.array([0, 1, 2, 3, 4, 5, 6] * 30)
KEYS = np.arange(210, dtype=np.int64)


def made(**options) -> list[str]:
    return QueryMaker(TEXTS, DeriveConfig(**options)).queries(ITEMS, KEYS)


def test_words_of_the_text_in_order():
    allowed = {
        0: {"toy", "story", "toy story"},
        1: {"matrix", "the", "matrix the"},
        2: {"500"},  # nothing stands outside the parentheses
        6: {"léon", "the", "professional", "léon the", "léon professional", "the professional",
            "léon the professional"},
    }  # fmt: skip
    found = made(typo_rate=0)
    for item, words in allowed.items():
        assert {query for at, query in zip(ITEMS, found, strict=True) if at == item} == words
    assert {found[row] for row in np.flatnonzero(np.isin(ITEMS, [3, 4, 5]))} == {""}


def test_what_is_ignored_is_a_setting():
    assert any("1995" in query for query in made(ignore="", typo_rate=0))
    assert not any("story" in query for query in made(ignore="story", typo_rate=0))


def test_typing_errors_are_inside_the_longest_word():
    found = [query for item, query in zip(ITEMS, made(typo_rate=1), strict=True) if item == 6]
    long = {word for query in found for word in query.split() if word.startswith("p")}
    assert long
    assert "professional" not in {word for word in long if sorted(word) != sorted("professional")}
    for word in long:
        swapped = sorted(word) == sorted("professional") and len(word) == 12
        assert swapped or len(word) == 11
    others = {word for query in found for word in query.split() if word.startswith("t")}
    assert "the" in others
    assert all(len(word) == 3 for word in others)


def test_rates_are_kept():
    rows = np.zeros(4000, dtype=np.int64)
    keys = np.arange(4000, dtype=np.int64)
    config = DeriveConfig(typo_rate=0.25, max_words=2)
    found = QueryMaker(["wonderful spectacle"], config).queries(rows, keys)
    words = {"wonderful", "spectacle"}
    wrong = np.mean([not set(query.split()) <= words for query in found])
    assert 0.22 < wrong < 0.28
    assert 0.47 < np.mean([" " in query for query in found]) < 0.53


@given(st.permutations(range(210)))
def test_a_row_is_the_same_wherever_it_stands(order):
    maker = QueryMaker(TEXTS, DeriveConfig())
    whole = maker.queries(ITEMS, KEYS)
    rows = np.array(order)
    assert maker.queries(ITEMS[rows], KEYS[rows]) == [whole[row] for row in order]


def test_another_seed_gives_other_queries():
    assert made() == made()
    assert made() != made(seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_words": 0}, "max_words"),
        ({"typo_rate": 1.5}, "typo_rate"),
        ({"seed": -1}, "seed"),
        ({"ignore": "("}, "regular expression"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        DeriveConfig(**options)


def test_blocks_of_rows_change_nothing(monkeypatch):
    whole = QueryMaker(TEXTS, DeriveConfig()).queries(ITEMS, KEYS)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    assert QueryMaker(TEXTS, DeriveConfig()).queries(ITEMS, KEYS) == whole
    assert len(whole) > 7


RUN = st.text("红色连衣裙夏季新款手机", min_size=2, max_size=9)
TITLE = st.lists(RUN | st.sampled_from(["iphone", "4k", "xl"]), min_size=1, max_size=4)


@given(TITLE.map(" ".join), st.integers(0, 2**40), st.integers(1, 9))
def test_titles_without_spaces_give_a_part_of_them(title, key, most):
    config = DeriveConfig(typo_rate=0, max_words=most)
    (query,) = QueryMaker([title], config).queries(np.zeros(1, np.int64), np.array([key]))
    place = 0
    for part in query.split():
        place = title.index(part, place)
    assert 1 <= len(words_of(query)) <= most
    if len(words_of(title)) > 1 and any(word[0] > "z" for word in title.split()):
        assert len(query.replace(" ", "")) < len(title.replace(" ", ""))


def test_pairs_that_overlap_are_written_as_one_piece():
    keys = np.arange(200)
    maker = QueryMaker(["红色连衣裙夏季"], DeriveConfig(typo_rate=0))
    found = set(maker.queries(np.zeros(200, np.int64), keys))
    assert {"连衣", "连衣裙", "红色连衣", "红色 裙夏"} <= found
    assert all(1 <= len(words_of(query)) <= 3 for query in found)
