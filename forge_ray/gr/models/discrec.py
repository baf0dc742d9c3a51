"""Input module that reads the codes of one item together before the stacks see them.

A semantic ID's codes mean something only together, while the stacks mix codes of all items at once.
Here every code's vector is blended with what a small attention inside its own item makes of it.
Knows embeddings and which of them starts a history; knows nothing about codes, caches or losses.

Source: DiscRec (arXiv 2506.15576): local branch FFN(LN(h + attention(h))) of h = LN(e + P), global
branch e, and a softmax gate per token over ⟨branch, w⟩. We differ in cutting items out of the
sequence instead of masking it, so that the cost per token does not grow with the history, any
number of levels works, and cached decoding needs no more than the codes of the item begun.

Shapes: S tokens of a sequence, L levels, l codes of an item so far, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_HEADS = 2
"""Attention heads inside an item (the paper's)."""


class DiscRec(nn.Module):
    """See the module docstring.

    Attributes:
        places: [L + 1, D], vector of a token's place: 0 starts a history, 1..L are levels.
        gates: [2, D], what global and local branch are weighed by; zeros weigh them equally.
    """

    places: nn.Parameter
    gates: nn.Parameter

    def __init__(self, width: int, num_levels: int, *, inner: int, dropout: float) -> None:
        """Creates fresh weights.

        Args:
            width: D.
            num_levels: L.
            inner: width of the feed-forward part.
            dropout: share of its inner activations dropped while training.
        """
        super().__init__()
        self._num_levels = num_levels
        self.places = nn.Parameter(torch.randn(num_levels + 1, width) * 0.02)
        self.gates = nn.Parameter(torch.zeros(2, width))
        self.input_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, inner), nn.ReLU(), nn.Dropout(dropout), nn.Linear(inner, width)
        )

    def forward(self, embedded: Tensor, is_start: Tensor, *, is_causal: bool) -> Tensor:
        """Blends the tokens of whole sequences.

        Args:
            embedded: [..., S, D], items one after the other from the second token on; the last item
                may lack its last code if `is_causal`. Sequences may also follow one another in S,
                each with a start and an item that lacks its last code.
            is_start: bool [..., S], tokens that start a history and belong to no item.
            is_causal: whether a code sees only codes before it.

        Returns:
            [..., S, D].
        """
        levels, length = self._num_levels, embedded.shape[-2]
        whole = length - length % levels
        # One place to the left, items begin at multiples of L. Where a code is lacking stands the
        # next start: the last of its item, it is seen by nobody and replaced below.
        shifted = embedded.roll(-1, dims=-2)[..., :whole, :]
        items = shifted.reshape(-1, levels, embedded.shape[-1])
        mixed = self._blend(items, first=1, is_causal=is_causal).reshape(shifted.shape)
        out = torch.cat([mixed, embedded[..., whole:, :]], dim=-2).roll(1, dims=-2)
        starts = self._blend(embedded.unsqueeze(-2)[is_start], first=0, is_causal=True)
        return out.masked_scatter(is_start.unsqueeze(-1), starts)

    def item(self, embedded: Tensor) -> Tensor:
        """Blends the codes of items under generation, [..., l, D] of levels 1..l."""
        flat = embedded.reshape(-1, *embedded.shape[-2:])
        return self._blend(flat, first=1, is_causal=True).reshape(embedded.shape)

    def _blend(self, embedded: Tensor, *, first: int, is_causal: bool) -> Tensor:
        """Gated sum of both branches of items [M, l, D] whose codes stand at `first` and after."""
        places = self.places[first : first + embedded.shape[1]]
        hidden = self.input_norm(embedded + places)
        local = self.feed(self.norm(hidden + self._attend(hidden, is_causal=is_causal)))
        scores = torch.stack(
            [embedded @ self.gates[0].unsqueeze(-1), local @ self.gates[1].unsqueeze(-1)]
        )
        share = scores.softmax(dim=0)
        blended: Tensor = share[0] * embedded + share[1] * local
        return blended

    def _attend(self, hidden: Tensor, *, is_causal: bool) -> Tensor:
        shape = (*hidden.shape[:2], 3, _HEADS, hidden.shape[2] // _HEADS)
        query, key, value = self.attention_in(hidden).reshape(shape).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        attended: Tensor = self.attention_out(found.transpose(1, 2).flatten(2))
        return attended


def extended(path: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
    """Tokens of the items under generation after one more code.

    Args:
        path: int64 [B, W', l], tokens of every beam so far.
        parents: int64 [B, W], beam that each new beam continues.
        tokens: int64 [B, W], the new codes.

    Returns:
        int64 [B, W, l + 1].
    """
    index = parents.clamp(min=0).unsqueeze(-1).expand(-1, -1, path.shape[2])
    return torch.cat([path.gather(1, index), tokens.unsqueeze(-1)], dim=2)
