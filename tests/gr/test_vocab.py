from __future__ import annotations

import numpy as np
import pytest
import torch

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.gr.vocab import BOS, PAD, Vocab


def test_tokens_of_levels_are_disjoint_and_complete():
    vocab = Vocab((3, 2, 4))
    codes = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4))
    tokens = vocab.tokens(codes)
    assert vocab.size == 12
    assert [sorted(set(tokens[:, level].tolist())) for level in range(3)] == [
        [3, 4, 5],
        [6, 7],
        [8, 9, 10, 11],
    ]


def test_levels_of_tokens_count_from_one_and_specials_are_none():
    vocab = Vocab((3, 2, 4))
    tokens = torch.tensor([[PAD, BOS, 2], [3, 5, 6], [7, 8, 11]])
    assert vocab.levels_of(tokens).tolist() == [[0, 0, 0], [1, 1, 2], [2, 3, 3]]


def test_history_tokens_are_left_padded_with_bos_before_the_first_item():
    vocab = Vocab((4, 4))
    codes = np.array([[0, 0], [1, 2], [3, 1]], dtype=np.uint16)
    items = Ragged.from_lists([[0, 1, 2], [2], []], dtype=np.int32)
    tokens, mask = vocab.history_tokens(items, codes, max_items=2)
    assert tokens.tolist() == [
        [BOS, 4, 9, 6, 8],
        [PAD, PAD, BOS, 6, 8],
        [PAD, PAD, PAD, PAD, BOS],
    ]
    assert mask.tolist() == (tokens != PAD).tolist()


def test_history_codes_undo_history_tokens():
    vocab = Vocab((4, 5))
    codes = np.array([[0, 0], [1, 2], [3, 1]], dtype=np.uint16)
    items = Ragged.from_lists([[0, 1, 2], [2], []], dtype=np.int32)
    found, lengths = vocab.history_codes(*vocab.history_tokens(items, codes, max_items=2))
    assert lengths.tolist() == [2, 1, 0]
    assert found[0].tolist() == codes[[1, 2]].tolist()
    assert found[1, 0].tolist() == codes[2].tolist()
    assert found.min() >= 0
    assert (found.amax(dim=(0, 1)) < torch.tensor([4, 5])).all()


def test_empty_codebook_is_refused():
    with pytest.raises(ConfigError, match="codebook_sizes must be >= 1"):
        Vocab((4, 0))
