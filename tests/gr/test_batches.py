from __future__ import annotations

import numpy as np
import torch

from forge_ray.config import load_config
from forge_ray.data.ragged import Ragged
from forge_ray.gr.batches import micro_batches
from forge_ray.gr.config import GrConfig

CODES = np.arange(20).reshape(10, 2)


def test_padded_passes_hold_neighbours_and_may_be_empty():
    rows = Ragged.from_lists([[1], [2, 3]], dtype=np.int64)
    parts = micro_batches(rows, CODES, 3, is_packed=False)
    assert [part.lengths.tolist() for part in parts] == [[1], [2], [0]]
    assert torch.equal(parts[1].codes, torch.tensor([[[4, 5], [6, 7]]]))


def test_packed_passes_hold_nearly_equal_numbers_of_items():
    lengths = np.sort(np.random.default_rng(0).geometric(0.15, size=64))
    rows = Ragged.from_lengths(np.zeros(lengths.sum(), dtype=np.int64), lengths)
    items = {
        is_packed: [
            int(part.lengths.sum()) for part in micro_batches(rows, CODES, 4, is_packed=is_packed)
        ]
        for is_packed in (True, False)
    }
    assert sum(items[True]) == sum(items[False]) == lengths.sum()
    assert max(items[True]) < 1.3 * min(items[True])
    assert max(items[False]) > 4 * min(items[False])


def test_rows_are_sorted_by_length_over_batches_only_where_they_are_padded():
    def window(*overrides: str) -> int:
        return load_config(GrConfig, overrides=list(overrides)).plan.window_batches

    assert window() == 1
    assert window("model.packing=false") == window("model.kind=t5") == 64
    assert window("model.attention=eager") == 64
    assert window("data.window_batches=8") == 8
