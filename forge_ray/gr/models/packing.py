"""Sequence packing: rows of a batch laid end to end, so that no token is spent on padding.

All layers but attention treat tokens one by one and run over the flat tokens. Attention runs over
rectangles of rows of nearly equal length, cut from the flat tokens and put back, so that no row
sees another. Knows lengths of rows and attention kernels; knows nothing about codes or losses.

Rectangles were measured against one rectangle of the longest row (2.2 times slower on amazon-beauty
histories, four layers of width 128, one thread) and against one rectangle per length (equal).

Shapes: B rows, M items, L levels, T = M * L tokens, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

KERNEL = "forge_ray_packed"
"""Name under which transformers finds `packed_attention`."""

GROWTH = 1.25
"""Longest over shortest row of a rectangle: what attention may waste, against kernel calls."""


@dataclass(frozen=True)
class Rectangle:
    """Neighbouring rows that attention reads together.

    Attributes:
        start: first flat token.
        end: one behind the last.
        rows: number of rows.
        width: tokens of the longest row.
        gather: int64 [rows * width], flat token of every cell, a row's last one repeated behind its
            end; None when all rows are equally long.
        keep: int64 [end - start], cells that hold the tokens; None likewise.
    """

    start: int
    end: int
    rows: int
    width: int
    gather: Tensor | None
    keep: Tensor | None


@dataclass(frozen=True)
class Packing:
    """Where the rows of a batch lie among its flat tokens; empty rows are left out.

    Attributes:
        order: int64 [B'], row of the batch at each place, shortest first.
        lengths: int64 [B'], items of those rows.
        positions: int64 [T], place of every token in its row.
        rectangles: what attention reads.
    """

    order: Tensor
    lengths: Tensor
    positions: Tensor
    rectangles: tuple[Rectangle, ...]

    @classmethod
    def of(cls, lengths: Tensor, num_levels: int) -> Packing:
        """Lays out rows of these lengths [B], in items of `num_levels` tokens."""
        device = lengths.device
        # Shapes depend on the lengths: one copy to the host, at the start of a pass.
        items = lengths.cpu().numpy()
        order = np.argsort(items, kind="stable")[(items == 0).sum() :]
        tokens = items[order] * num_levels
        offsets = np.concatenate([[0], np.cumsum(tokens)])
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], tokens)
        return cls(
            order=torch.from_numpy(order).to(device),
            lengths=torch.from_numpy(items[order]).to(device),
            positions=torch.from_numpy(positions).to(device),
            rectangles=_rectangles(tokens, offsets, device),
        )

    @property
    def last_items(self) -> Tensor:
        """The last item of each row among all items, int64 [B']."""
        return self.lengths.cumsum(0) - 1

    def items(self, values: Tensor) -> Tensor:
        """Rows [B, N, …] as the items in them [M, …], row after row."""
        is_item = torch.arange(values.shape[1], device=values.device) < self.lengths.unsqueeze(1)
        return values[self.order][is_item]

    def shift_right(self, tokens: Tensor, first: int) -> Tensor:
        """Tokens [T] moved one place inside every row, which begins with `first`."""
        return tokens.roll(1).masked_fill(self.positions == 0, first)

    def items_back(self, num_levels: int) -> Tensor:
        """Items between the item of each shifted token and its row's last one, int64 [T]."""
        length = self.lengths.repeat_interleave(self.lengths * num_levels)
        return length - 1 - (self.positions - 1).div(num_levels, rounding_mode="floor")


def _rectangles(
    tokens: NDArray[np.int64], offsets: NDArray[np.int64], device: torch.device
) -> tuple[Rectangle, ...]:
    """Cuts rows, shortest first, where the next one is longer than `GROWTH` times the first."""
    found = []
    first = 0
    while first < len(tokens):
        behind = int(np.searchsorted(tokens, tokens[first] * GROWTH, side="right"))
        lengths, starts = tokens[first:behind], offsets[first:behind]
        width = int(lengths[-1])
        gather = keep = None
        if lengths[0] < width:
            column = np.arange(width)
            cell = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
            gather = torch.from_numpy(cell.ravel()).to(device)
            keep = torch.from_numpy(np.flatnonzero(column < lengths[:, None])).to(device)
        found.append(
            Rectangle(
                int(starts[0]), int(offsets[behind]), len(lengths), width, gather=gather, keep=keep
            )
        )
        first = behind
    return tuple(found)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside the rows of a packing; transformers' sdpa without one.

    Args:
        module: the attention layer.
        query: [1, H, T, d].
        key: [1, H', T, d].
        value: [1, H', T, d].
        attention_mask: not read with a packing.
        packing: where the rows lie.
        dropout: share of attention weights dropped.
        scaling: of the scores.
        **others: for transformers' own kernel.

    Returns:
        [1, T, H, d], and None for the weights that nobody asks for.
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found, None
    parts = [
        _attend(rectangle, (query[0], key[0], value[0]), dropout=dropout, scaling=scaling)
        for rectangle in packing.rectangles
    ]
    return torch.cat(parts).unsqueeze(0), None


def _attend(
    rectangle: Rectangle, states: Sequence[Tensor], *, dropout: float, scaling: float | None
) -> Tensor:
    """Attention of one rectangle: its tokens [end - start, H, d]."""
    cells = [
        one[:, rectangle.start : rectangle.end]
        if rectangle.gather is None
        else one.index_select(1, rectangle.gather)
        for one in states
    ]
    query, key, value = (
        one.reshape(len(one), rectangle.rows, rectangle.width, -1).transpose(0, 1) for one in cells
    )
    found = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    tokens = found.transpose(1, 2).flatten(0, 1)
    return tokens if rectangle.keep is None else tokens.index_select(0, rectangle.keep)


def register_kernel() -> None:
    """Makes `packed_attention` known to transformers, under `KERNEL`."""
    from transformers import AttentionInterface

    # Which rectangles there are differs from batch to batch: compiled blocks call the kernel as it
    # is. Wrapped here, as the wrapper's import costs a second.
    kernel = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(KERNEL, kernel)
