"""Ids to bytes and back, and their dense index against a dictionary."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from forge_ray.data import item_index
from forge_ray.data.item_index import (
    DROPPED,
    UNKNOWN,
    ItemIndex,
    distinct,
    to_bytes,
    to_strings,
)


def test_ids_become_bytes_of_one_width_and_come_back() -> None:
    ids = ["b", "", "lång", "語", "b2"]
    packed = to_bytes(pa.array(ids))
    assert packed.tolist() == [one.encode() for one in ids]
    assert to_strings(packed).to_pylist() == ids
    assert to_strings(to_bytes(pa.array([], pa.string()))).to_pylist() == []
    index = ItemIndex(np.sort(packed))
    wanted = pa.array(["語", "none", None, "b"])
    order = sorted(one.encode() for one in ids)
    expected = [order.index("語".encode()), UNKNOWN, UNKNOWN, order.index(b"b")]
    assert index.lookup(wanted).tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000, 20_000])
def test_every_id_is_found_as_a_dictionary_finds_it(count: int) -> None:
    draw = np.random.default_rng(count)
    words = {f"{one:x}" for one in draw.integers(0, 10**6, count)} | {"zz", "zz9"}
    listed, dropped = sorted(words)[: len(words) * 3 // 4], sorted(words)[len(words) * 3 // 4 :]
    index = ItemIndex(to_bytes(pa.array(listed, pa.string())), to_bytes(pa.array(dropped)))
    expected: dict[str | None, int] = dict.fromkeys(dropped, DROPPED)
    expected |= {one: place for place, one in enumerate(listed)}
    asked = [*draw.permutation(sorted(words)).tolist(), None, "", "longer than any of them", "zz"]
    assert len(index) == len(listed)
    found = index.lookup(pa.array(asked, pa.string()))
    assert found.tolist() == [expected.get(one, UNKNOWN) for one in asked]
    assert found.dtype == np.int32


@pytest.mark.parametrize("rows_at_once", [1, 7, 1 << 18])
def test_distinct_ids_of_many_parts_keep_the_order_of_first_places(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(item_index, "_ROWS_AT_ONCE", rows_at_once)
    draw = np.random.default_rng(0)
    parts = [
        [f"i{one}" for one in draw.integers(0, 300, size)] for size in draw.integers(0, 20, 100)
    ]
    found = distinct(pa.array(part, pa.string()) for part in parts)
    assert found.to_pylist() == list(dict.fromkeys(one for part in parts for one in part))
    assert distinct([]).to_pylist() == []


def test_distinct_ids_do_not_hash_what_is_known_with_every_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Known ids go through `unique` again only when as many rows have come since."""
    monkeypatch.setattr(item_index, "_ROWS_AT_ONCE", 1)
    hashed = []
    joined = pa.chunked_array

    def counted(parts: list[pa.Array]) -> pa.ChunkedArray:
        hashed.append(sum(len(one) for one in parts))
        return joined(parts)

    monkeypatch.setattr(pa, "chunked_array", counted)
    distinct(pa.array([f"i{number}"]) for number in range(1000))
    assert sum(hashed) < 4 * 1000
