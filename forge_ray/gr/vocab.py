"""Token ids: how the codes of semantic IDs become the alphabet of a generator.

Knows codebook sizes and special tokens, and how histories become padded token rows. It knows
nothing about models, files or what an item is beyond its row in the code table.

Shapes: B rows, N items of a row, L levels, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError

PAD = 0
"""Fills short rows; never attended to, never a target."""
BOS = 1
"""First token of every history, so that an empty history is a valid input."""
SEP = 2
"""Reserved: end of sequence, or a separator between segments."""


@dataclass(frozen=True)
class Vocab:
    """Token ids of all codes: ``num_special + offset of the level + code``.

    Levels have disjoint ranges, so a token tells its level and no position marker is needed.

    Attributes:
        codebook_sizes: codes of each of the L levels.
        num_special: ids before the first code (PAD, BOS, SEP).
    """

    codebook_sizes: tuple[int, ...]
    num_special: int = 3

    def __post_init__(self) -> None:
        """Checks that there is something to predict."""
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ConfigError(
                f"codebook_sizes must be >= 1 at every level, got {self.codebook_sizes}. "
                "Fit semantic IDs first."
            )

    @property
    def num_levels(self) -> int:
        """L, the tokens of one item."""
        return len(self.codebook_sizes)

    @property
    def size(self) -> int:
        """Number of token ids, specials included."""
        return self.num_special + sum(self.codebook_sizes)

    @property
    def level_offsets(self) -> tuple[int, ...]:
        """First code of each level counted over all levels (without specials), length L."""
        return tuple(sum(self.codebook_sizes[:level]) for level in range(self.num_levels))

    def tokens(self, codes: Tensor) -> Tensor:
        """Token ids int64 [..., L] of integer codes [..., L]."""
        offsets = torch.tensor(self.level_offsets, device=codes.device) + self.num_special
        return codes.long() + offsets

    def levels_of(self, tokens: Tensor) -> Tensor:
        """Level of each token id counted from 1, int64 of the same shape; 0 for specials."""
        starts = torch.tensor(self.level_offsets, device=tokens.device) + self.num_special
        return torch.bucketize(tokens, starts, right=True)

    def level_tokens(self, codes: Tensor, level: int) -> Tensor:
        """Token ids int64 [...] of codes [...] that all belong to one level."""
        return codes.long() + (self.num_special + self.level_offsets[level])

    def history_tokens(
        self, items: Ragged, codes: NDArray[np.integer[Any]], max_items: int
    ) -> tuple[Tensor, Tensor]:
        """Histories as left-padded token rows, BOS first.

        Args:
            items: B histories of item indices, oldest first; rows may be empty.
            codes: integer codes [num_items, L], row i of item i.
            max_items: newest items of each history to keep.

        Returns:
            tokens int64 [B, S] with S = 1 + L * longest kept history, and the mask bool [B, S],
            False on padding.
        """
        kept = items.tail(max_items)
        padded = torch.from_numpy(kept.padded(side="left", fill=-1).astype(np.int64))
        is_item = padded >= 0
        table = np.ascontiguousarray(codes[np.maximum(padded.numpy(), 0)]).astype(np.int64)
        body = self.tokens(torch.from_numpy(table)).masked_fill(~is_item.unsqueeze(-1), PAD)
        body_mask = is_item.repeat_interleave(self.num_levels, dim=1)
        rows = len(kept)
        tokens = torch.cat([torch.full((rows, 1), PAD), body.reshape(rows, -1)], dim=1)
        mask = torch.cat([torch.zeros(rows, 1, dtype=torch.bool), body_mask], dim=1)
        # BOS stands directly before the first item, wherever the padding ends.
        start = (tokens.shape[1] - 1 - body_mask.sum(dim=1, keepdim=True)).long()
        return tokens.scatter(1, start, BOS), mask.scatter(1, start, True)

    def history_recency(self, num_tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Items back from the next one, int64 [S], for the columns of `history_tokens`.

        The newest item is 1. BOS counts as one item before the oldest, whatever its column.
        """
        back = torch.arange(num_tokens - 1, -1, -1, device=device)
        return back // self.num_levels + 1

    def history_codes(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What `history_tokens` was made from, padded on the right instead.

        Args:
            tokens: int64 [B, 1 + N * L], left padded, BOS first.
            mask: bool [B, 1 + N * L], False on padding.

        Returns:
            codes int64 [B, N, L], any valid codes behind the last item, and int64 [B] items.
        """
        offsets = torch.tensor(self.level_offsets, device=tokens.device) + self.num_special
        body = tokens[:, 1:].reshape(len(tokens), -1, self.num_levels)
        lengths = (mask.sum(dim=1) - 1) // self.num_levels
        item = torch.arange(body.shape[1], device=tokens.device)
        # The first item moves to the front; what stood before it follows the last.
        place = (item - lengths.unsqueeze(1)) % max(1, body.shape[1])
        return (body - offsets).clamp(min=0).gather(1, place.unsqueeze(-1).expand_as(body)), lengths


def vocab_of(codebook_sizes: Sequence[int]) -> Vocab:
    """The vocabulary of a SID table with these codebooks."""
    return Vocab(tuple(int(size) for size in codebook_sizes))
