"""The kernel of encoding equals a plain search, whatever stands beside a row."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from forge_ray.sid.quantizers.nearest import TILE_ROWS, nearest_codes, rank_nearest


@pytest.mark.parametrize("dim", [24, 300])
@pytest.mark.parametrize("rows", [1, TILE_ROWS, 5 * TILE_ROWS + 7])
def test_codes_equal_a_flat_index(rows: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((rows, dim), dtype=np.float32)
    words = rng.standard_normal((70, dim), dtype=np.float32)
    index = faiss.IndexFlatL2(dim)
    index.add(words)
    book = torch.from_numpy(words)
    codes = nearest_codes(torch.from_numpy(points), book, book.square().sum(dim=1))
    assert np.array_equal(codes.numpy(), index.search(points, 1)[1][:, 0])


def test_offsets_move_the_choice_and_the_lowest_code_wins_a_tie() -> None:
    points = torch.zeros(5, 3)
    book = torch.ones(4, 3)
    assert nearest_codes(points, book, torch.tensor([3.0, 3.0, 3.0, 3.0])).tolist() == [0] * 5
    assert nearest_codes(points, book, torch.tensor([3.0, 3.0, 2.5, 3.0])).tolist() == [2] * 5


@pytest.mark.parametrize("limit", [1, 4, 30, 99])
def test_ranking_equals_a_stable_sort(limit: int) -> None:
    rng = np.random.default_rng(1)
    # Few distinct values of either sign, both zeros among them: mostly ties.
    distances = rng.integers(-3, 4, size=(200, 30)).astype(np.float32)
    distances[distances == 0] *= rng.choice([-1.0, 1.0], size=(distances == 0).sum())
    expected = np.argsort(distances, axis=1, kind="stable")[:, :limit]
    assert np.array_equal(rank_nearest(distances, limit), expected)
