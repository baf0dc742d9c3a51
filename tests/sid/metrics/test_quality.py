"""Symbol statistics: exact against naive definitions, and facts of the published tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.sid.metrics import quality
from forge_ray.sid.metrics.quality import (
    distinct_rows,
    gini,
    gini_histogram,
    prefix_ids,
    symbol_quality,
)
from forge_ray.sid.table import SidTable

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def draw_codes(seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, size=rng.integers(1, 5)).tolist()
    return rng.integers(0, sizes, size=(rng.integers(1, 40), len(sizes))), sizes


@given(COUNTS)
def test_gini_equals_mean_absolute_difference(counts: list[int]) -> None:
    n = np.array(counts, float)
    naive = np.abs(n[:, None] - n[None]).mean() / (2 * n.mean())
    assert gini(np.array(counts)) == pytest.approx(naive, abs=1e-12)


@given(COUNTS)
def test_gini_equals_the_area_under_the_lorenz_curve(counts: list[int]) -> None:
    lorenz = np.concatenate([[0.0], np.cumsum(np.sort(counts)) / sum(counts)])
    area = np.trapezoid(lorenz, dx=1 / len(counts))
    assert gini(np.array(counts)) == pytest.approx(1 - 2 * area, abs=1e-12)


@given(COUNTS, st.integers(2, 50))
def test_gini_ignores_empty_buckets_and_copies(counts: list[int], copies: int) -> None:
    plain = gini(np.array(counts))
    assert gini(np.array([*counts, 0, 0, 0])) == plain
    sizes, multiplicity = np.unique(counts, return_counts=True)
    assert gini_histogram(sizes, multiplicity * copies) == pytest.approx(plain, abs=1e-12)


def test_gini_of_equal_buckets_is_zero_and_of_a_huge_histogram_exact() -> None:
    assert gini(np.full(7, 3)) == 0.0
    assert gini(np.array([], dtype=int)) == 0.0
    # 10^9 buckets of 1 and 10^9 of 3: (n·S) passes 2^63; the exact value is 1/4.
    assert gini_histogram(np.array([1, 3]), np.array([10**9, 10**9])) == 0.25


@given(st.integers(0, 2**32 - 1))
def test_prefix_ids_number_distinct_prefixes_in_order(seed: int) -> None:
    codes, _ = draw_codes(seed)
    found = prefix_ids(codes)
    for depth in range(1, codes.shape[1] + 1):
        distinct, inverse = np.unique(codes[:, :depth], axis=0, return_inverse=True)
        assert np.array_equal(found.ids[depth - 1], inverse.ravel())
        assert found.counts[depth - 1] == len(distinct)


@given(st.integers(0, 2**32 - 1))
def test_report_equals_counting_by_hand(seed: int) -> None:
    codes, sizes = draw_codes(seed)
    with mock.patch.object(quality, "_BLOCK", 4):  # runs cross blocks at every depth
        report = symbol_quality(codes, sizes)
    buckets = Counter(map(tuple, codes.tolist()))
    groups = Counter(tuple(row[:-1]) for row in codes.tolist())
    assert report.num_sids == len(buckets)
    assert report.uniqueness == len(buckets) / len(codes)
    assert report.max_bucket == max(buckets.values())
    assert report.coverage == pytest.approx(len(buckets) / np.prod(sizes))
    assert report.gini == pytest.approx(gini(np.array(list(buckets.values()))))
    assert report.max_group == max(groups.values())
    colliding = sum(size for size in buckets.values() if size > 1)
    assert report.colliding_items == pytest.approx(colliding / len(codes))
    for level, usage in enumerate(report.levels):
        share = np.array(list(Counter(codes[:, level].tolist()).values())) / len(codes)
        assert usage.dead == sizes[level] - len(share)
        assert usage.prefixes == len({tuple(row[: level + 1]) for row in codes.tolist()})
        assert usage.perplexity == pytest.approx(np.prod(share**-share))
        assert 0 <= usage.entropy <= 1 + 1e-12


@given(st.integers(0, 2**32 - 1))
def test_permuting_items_changes_nothing(seed: int) -> None:
    codes, sizes = draw_codes(seed)
    shuffled = np.random.default_rng(seed).permutation(codes)
    before = symbol_quality(codes, sizes).to_metrics()
    assert symbol_quality(shuffled, sizes).to_metrics() == pytest.approx(before)


@pytest.mark.parametrize("size", [300, 1 << 16])
def test_wide_keys_and_keys_beyond_63_bits_give_the_same_figures(size: int) -> None:
    codes = np.random.default_rng(0).integers(0, 3, size=(500, 4))
    narrow = symbol_quality(codes, [3, 3, 3, 3])
    wide = symbol_quality(codes, [size, size, size, size])
    names = ("num_sids", "gini", "colliding_items", "max_bucket", "mean_bucket", "max_group")
    for name in names:
        assert getattr(wide, name) == getattr(narrow, name)
    assert [level.prefixes for level in wide.levels] == [level.prefixes for level in narrow.levels]
    assert [level.dead for level in wide.levels] == [size - 3] * 4
    # Keys of 58 bits leave no room for the row beside them; of 86, for nothing.
    for shift in (13, 20):
        far = codes * (1 << shift)
        assert prefix_ids(far).counts == prefix_ids(codes).counts
        assert np.array_equal(prefix_ids(far).ids, prefix_ids(codes).ids)
    assert np.array_equal(distinct_rows(codes), np.unique(codes, axis=0))


@pytest.mark.parametrize(
    ("file", "num_sids"),
    [
        ("amazon-beauty/sid_indexes/rkmeans_native.npz", 10_527),
        ("amazon-beauty/sid_indexes/rqvae_native.npz", 11_499),
        ("amazon-beauty/sid_indexes/letter_native.npz", 12_015),
        ("amazon-beauty/sid_indexes/mql4grec.npz", 12_101),
        ("sid-cell-47k/rkmeans_native.npz", 39_074),
    ],
)
def test_published_tables(shared_data: Path, file: str, num_sids: int) -> None:
    table = SidTable.from_npz(shared_data / file)
    assert symbol_quality(table.codes, table.codebook_sizes).num_sids == num_sids
