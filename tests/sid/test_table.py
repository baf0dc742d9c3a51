"""The SID table: keys order prefixes, text carries offsets, files round-trip or refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.errors import ConfigError, DataError
from forge_ray.sid.table import SidTable, prefix_keys


@pytest.fixture
def table() -> SidTable:
    return SidTable.from_codes(np.array([[0, 1, 2], [3, 0, 5], [3, 0, 4]]), [4, 2, 8])


def test_offsets_and_text_are_cumulative(table: SidTable) -> None:
    assert table.level_offsets.tolist() == [0, 4, 6]
    assert table.text([1, 0]) == ["C3C4C11", "C0C5C8"]
    assert table.codes.dtype == np.uint16


@given(st.integers(0, 2**32 - 1))
def test_prefix_keys_order_rows_and_contain_their_parent(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, size=4).tolist()
    codes = rng.integers(0, sizes, size=(20, 4))
    assert np.array_equal(
        np.argsort(prefix_keys(codes, sizes, 4), kind="stable"), np.lexsort(codes.T[::-1])
    )
    for depth in range(1, 5):
        keys = prefix_keys(codes, sizes, depth)
        assert np.array_equal(keys // sizes[depth - 1], prefix_keys(codes, sizes, depth - 1))
        assert len(np.unique(keys)) == len(np.unique(codes[:, :depth], axis=0))


def test_prefix_keys_refuse_overflow_and_bad_depth(table: SidTable) -> None:
    wide = SidTable.from_codes(np.zeros((1, 5), int), [65536] * 5)
    assert wide.prefix_keys(3).tolist() == [0]
    with pytest.raises(ConfigError, match=r"below 2\^63"):
        wide.prefix_keys(4)
    with pytest.raises(ConfigError, match="depth must be between 0"):
        table.prefix_keys(4)


@pytest.mark.parametrize(
    ("codes", "sizes"),
    [
        (np.array([[0, 4]]), [4, 4]),
        (np.array([[-1, 0]]), [4, 4]),
        (np.zeros((3, 2), int), [4]),
        (np.zeros((3, 2)), [4, 4]),
    ],
)
def test_codes_outside_their_codebook_are_refused(codes: np.ndarray, sizes: list[int]) -> None:
    with pytest.raises(DataError):
        SidTable.from_codes(codes, sizes)


def test_npz_is_aligned_to_the_dataset(tmp_path) -> None:
    codes = np.array([[0, 9], [1, 8], [2, 7]], dtype=np.int16)
    path = tmp_path / "foreign.npz"
    np.savez(path, item_id=np.array(["c", "a", "b"]), codes=codes)
    table = SidTable.from_npz(path, np.array(["a", "b", "c"], dtype=object))
    assert table.codes.tolist() == [[1, 8], [2, 7], [0, 9]]
    assert table.codebook_sizes == (16, 16)
    with pytest.raises(DataError, match=r"1 of the dataset's items missing \(first: z\)"):
        SidTable.from_npz(path, np.array(["a", "b", "z"]))
    with pytest.raises(DataError, match="got 3 rows"):
        SidTable.from_npz(path, np.array(["a", "b"]))


def test_unreadable_npz_is_a_data_error(tmp_path) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match=r"readable \.npz"):
        SidTable.from_npz(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(DataError, match="array 'codes'"):
        SidTable.from_npz(path)


def test_published_tables_read_as_documented(shared_data) -> None:
    folder = shared_data / "amazon-beauty"
    with np.load(folder / "item_embeddings_minilm384.npz") as arrays:
        item_ids = arrays["item_id"]
    distinct = {"rkmeans_native": 10_527, "rqvae_native": 11_499, "letter_native": 12_015}
    for name, expected in distinct.items():
        table = SidTable.from_npz(folder / "sid_indexes" / f"{name}.npz", item_ids)
        assert table.codebook_sizes == (256,) * 4
        assert len(np.unique(table.prefix_keys(4))) == expected
