"""Ids to bytes and back, and their dense index against a dictionary."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from forge_ray.data.item_index import DROPPED, UNKNOWN, ItemIndex, to_bytes, to_strings


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
