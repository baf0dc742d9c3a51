"""Exact search for generators whose levels do not depend on each other: every SID is scored.

Where one pass gives the log-probabilities of all levels, a SID's score is a sum of L numbers, so
the whole catalogue is ranked and no prefix is ever dropped. Blocks of SIDs bound the memory,
whatever the catalogue's size. Knows a prefix index as a list of SIDs. Knows nothing about items.

Source: RPG (arXiv 2506.05781) scores by the mean over tokens; the sum orders alike and stays a
log-probability. Where we differ: every SID is scored, instead of a search on a graph of items.

Shapes: B users, S distinct SIDs, L levels, K codes of a level, W kept SIDs.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from forge_ray.gr.beam import Beams, checked_log_probs, sort_keys
from forge_ray.gr.prefix_index import PrefixIndex

_SIDS = 1 << 14
"""SIDs scored at a time: 2 MB of scores for 32 users, which stay in the cache."""


@runtime_checkable
class ParallelGenerator(Protocol):
    """A generator that predicts all levels at once."""

    def level_logits(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """Read histories [B, S]; L logits, float32 [B, K_level]."""


@torch.no_grad()
def exact_search(
    generator: ParallelGenerator, tokens: Tensor, mask: Tensor, index: PrefixIndex, width: int
) -> Beams:
    """The best SIDs of each history among all SIDs of the index; equal scores in SID order.

    Args:
        generator: in evaluation mode, on the device of the inputs.
        tokens: int64 [B, S], history tokens, left padded.
        mask: bool or int64 [B, S], 0 on padding.
        index: the valid SIDs, on the same device.
        width: SIDs to keep.

    Returns:
        Beams with W = ``width``; dead slots where there are fewer SIDs.

    Raises:
        TrainingError: when the model emits NaN.
    """
    logits = generator.level_logits(tokens, mask)
    levels = [checked_log_probs(one, level) for level, one in enumerate(logits)]
    by_token = torch.cat(levels, dim=1).T.contiguous()
    starts = torch.tensor([0, *index.codebook_sizes[:-1]], device=by_token.device).cumsum(0)
    best = torch.empty(len(tokens), 0, dtype=torch.int64, device=by_token.device)
    for start in range(0, index.num_sids, _SIDS):
        rows = torch.arange(start, min(start + _SIDS, index.num_sids), device=by_token.device)
        tokens_of = index.sids(rows) + starts
        scores = functional.embedding_bag(tokens_of, by_token, mode="sum").T
        best = torch.cat([best, sort_keys(scores, rows)], dim=1)
        best = best.topk(min(width, best.shape[1]), dim=1).values
    return _beams(best, index, width)


def _beams(keys: Tensor, index: PrefixIndex, width: int) -> Beams:
    """Reads scores and rows back from the keys, and pads with dead slots."""
    rows = (-keys) & 0xFFFFFFFF
    ordered = ((keys + rows) >> 32).to(torch.int32)
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    missing = width - keys.shape[1]
    pad = functional.pad
    return Beams(
        codes=pad(index.sids(rows), (0, 0, 0, missing), value=-1),
        scores=pad(scores, (0, missing), value=-torch.inf),
        sid_rank=pad(rows, (0, missing), value=-1),
    )
