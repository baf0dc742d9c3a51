from __future__ import annotations

import pytest
import torch
from torch import nn

from forge_ray.gr.models.discrec import DiscRec, extended


def make(levels: int) -> DiscRec:
    torch.manual_seed(0)
    module = DiscRec(8, levels, inner=16, dropout=0.0).eval()
    nn.init.normal_(module.gates)
    nn.init.normal_(module.places)
    return module


def by_hand(
    module: DiscRec, embedded: torch.Tensor, first: int, *, is_causal: bool
) -> torch.Tensor:
    """The formula for one item [l, D], head by head."""
    hidden = module.input_norm(embedded + module.places[first : first + len(embedded)])
    query, key, value = module.attention_in(hidden).chunk(3, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = query[:, head] @ key[:, head].T / 4**0.5
        if is_causal:
            hidden_from = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden_from, -torch.inf)
        heads.append(scores.softmax(-1) @ value[:, head])
    local = module.feed(module.norm(hidden + module.attention_out(torch.cat(heads, -1))))
    score = torch.stack([embedded @ module.gates[0], local @ module.gates[1]]).softmax(0)
    return score[0, :, None] * embedded + score[1, :, None] * local


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("levels", [1, 3])
def test_every_item_is_blended_by_itself(levels, is_causal):
    module = make(levels)
    embedded = torch.randn(2, 1 + 2 * levels, 8)
    is_start = torch.zeros(2, 1 + 2 * levels, dtype=torch.bool)
    is_start[:, 0] = True
    out = module(embedded, is_start, is_causal=is_causal)
    for row in range(2):
        expected = [by_hand(module, embedded[row, :1], 0, is_causal=True)]
        for start in (1, 1 + levels):
            item = embedded[row, start : start + levels]
            expected.append(by_hand(module, item, 1, is_causal=is_causal))
        assert torch.allclose(out[row], torch.cat(expected), atol=1e-5)


def test_histories_padded_on_the_left_start_anywhere():
    module = make(3)
    embedded = torch.randn(1, 7, 8)
    is_start = torch.tensor([[False, False, False, True, False, False, False]])
    out = module(embedded, is_start, is_causal=True)
    alone = module(embedded[:, 3:], is_start[:, 3:], is_causal=True)
    assert torch.allclose(out[:, 3:], alone, atol=1e-6)


def test_an_item_begun_equals_the_beginning_of_a_whole_one():
    module = make(3)
    embedded = torch.randn(5, 4, 3, 8)
    whole = module.item(embedded)
    assert torch.allclose(module.item(embedded[:, :, :2]), whole[:, :, :2], atol=1e-6)


def test_paths_follow_the_parents():
    path = torch.tensor([[[1, 2], [3, 4]]])
    longer = extended(path, torch.tensor([[1, 0, 1]]), torch.tensor([[7, 8, 9]]))
    assert longer.tolist() == [[[3, 4, 7], [1, 2, 8], [3, 4, 9]]]
