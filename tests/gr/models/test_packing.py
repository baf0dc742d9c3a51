"""Packed rows: nothing but speed differs from padded ones, and no row sees another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.gr.models.base import Generator, TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.packing import GROWTH, Packing
from forge_ray.gr.vocab import BOS, Vocab

VOCAB = Vocab((7, 5, 6))
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}


def make(**changes: object) -> Generator:
    torch.manual_seed(0)
    return DecoderConfig(dropout=0.0, **SMALL, **changes).build(VOCAB)


def batch(lengths: list[int]) -> TokenBatch:
    draw = torch.Generator().manual_seed(1)
    shape = (len(lengths), max(1, *lengths))
    codes = [torch.randint(size, shape, generator=draw) for size in VOCAB.codebook_sizes]
    return TokenBatch(torch.stack(codes, dim=2), torch.tensor(lengths))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("targets", ["all", "last"])
def test_loss_and_gradients_equal_those_of_padded_rows(family, targets):
    rows = batch([4, 1, 9, 0, 5, 20, 9, 2])
    found = {}
    for packing in (True, False):
        model = make(family=family, targets=targets, packing=packing)
        loss = model.loss(rows)
        loss.backward()
        found[packing] = (loss.item(), [one.grad for one in model.parameters()])
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    for packed, padded in zip(found[True][1], found[False][1], strict=True):
        assert torch.allclose(packed, padded, atol=1e-6)


def test_recency_of_packed_rows_equals_that_of_padded_rows():
    rows = batch([4, 2, 6])
    losses = []
    for packing in (True, False):
        model = make(targets="last", recency_embeddings=3, packing=packing)
        torch.nn.init.normal_(model.table.recent, std=0.3)
        losses.append(model.loss(rows).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_no_row_sees_another():
    model, rows = make(), batch([3, 3, 4])
    together = model.loss_sum(rows).item()
    alone = [
        model.loss_sum(TokenBatch(rows.codes[row : row + 1], rows.lengths[row : row + 1])).item()
        for row in range(3)
    ]
    assert together == pytest.approx(sum(alone), rel=1e-6)


def test_the_blocks_read_no_padding():
    model, rows = make(), batch([1, 2, 30])
    seen = []
    model.blocks.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"].shape), with_kwargs=True
    )
    model.loss_sum(rows)
    assert seen == [(1, 33 * 3, 32)]


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_rectangles_cover_every_token_once_and_waste_little(lengths):
    packing = Packing.of(torch.tensor(lengths), 3)
    tokens = sum(lengths) * 3
    cells, covered = 0, []
    for one in packing.rectangles:
        cells += one.rows * one.width
        inside = torch.arange(one.start, one.end) if one.gather is None else one.gather[one.keep]
        covered.append(inside)
        assert one.gather is None or one.gather.min() >= one.start
        assert one.gather is None or one.gather.max() < one.end
    assert torch.cat([torch.zeros(0, dtype=torch.int64), *covered]).tolist() == list(range(tokens))
    assert cells <= GROWTH * tokens


def test_shifted_tokens_begin_with_bos_in_every_row():
    packing = Packing.of(torch.tensor([2, 0, 1]), 2)
    assert packing.order.tolist() == [2, 0]
    assert packing.shift_right(torch.arange(10, 16), BOS).tolist() == [BOS, 10, BOS, 12, 13, 14]
    assert packing.items_back(2).tolist() == [1, 0, 2, 1, 1, 0]
    values = torch.from_numpy(np.arange(9).reshape(3, 3))
    assert packing.items(values).tolist() == [6, 0, 1]
    assert packing.last_items.tolist() == [0, 2]
