"""Hashes: the same whatever the type, the batch or the order, and against plain integers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data import hashing
from forge_ray.data.hashing import distinct_hashes, hash_ids, hashed_orders, unit_uniform

MASK = 2**64 - 1


def plain_mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def plain_hash(text: str) -> int:
    state = 0xCBF29CE484222325
    for letter in text.encode():
        state = (state ^ letter) * 0x100000001B3 & MASK
    return plain_mix(state)


@given(st.lists(st.text(st.characters(min_codepoint=1, codec="utf-8"), min_size=1), max_size=20))
def test_strings_hash_as_the_plain_formula_says(texts: list[str]) -> None:
    expected = [plain_hash(text) for text in texts]
    column = pa.array(texts, pa.string())
    for given_as in (column, pa.chunked_array([column, column]).slice(len(texts))):
        assert hash_ids(given_as).tolist() == expected
    assert hash_ids(np.array(texts, dtype=object)).tolist() == expected


def test_an_integer_hashes_as_its_spelling_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.array([7, 123456, 7_000_000_000])
    whole = hash_ids(numbers)
    for given_as in (numbers.astype(str), numbers.astype("S"), pa.array(numbers)):
        assert np.array_equal(hash_ids(given_as), whole)
    assert whole.tolist() == [plain_hash(str(number)) for number in numbers]
    assert len(np.unique(hash_ids(np.arange(100_000)))) == 100_000
    monkeypatch.setattr(hashing, "_CHUNK_ROWS", 2)
    assert np.array_equal(hash_ids(numbers), whole)
    assert hash_ids(np.array([], dtype=object)).shape == (0,)


def test_ids_that_share_a_hash_are_told_apart_whatever_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hashing, "mix64", lambda state: state % np.uint64(7))
    ids = np.array([f"i{number}" for number in range(40)], dtype=object)
    assert len(np.unique(hash_ids(ids))) <= 7
    hashes = distinct_hashes(ids)
    assert len(np.unique(hashes)) == 40
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(distinct_hashes(ids[order]), hashes[order])


@pytest.mark.parametrize("size", [2, 6, 7, 256])
def test_a_hashed_order_is_a_permutation_of_its_own(size: int) -> None:
    hashes = hash_ids(np.arange(4000))
    orders = hashed_orders(hashes, size, size, seed=3)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(size), (4000, 1)))
    assert np.array_equal(hashed_orders(hashes[5:6], size, 1, seed=3), orders[5:6, :1])
    assert not np.array_equal(hashed_orders(hashes, size, size, seed=4), orders)
    share = np.bincount(orders[:, 0], minlength=size) / 4000
    assert np.abs(share - 1 / size).max() < 5 * np.sqrt(1 / size / 4000)


def test_uniform_draws_are_uniform_and_differ_by_salt() -> None:
    draws = unit_uniform(np.arange(20_000), salt=1)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws, unit_uniform(np.arange(20_000), salt=2))[0, 1]) < 0.03
