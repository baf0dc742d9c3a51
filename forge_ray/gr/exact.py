"""Exact search for generators whose levels do not depend on each other: every SID is scored.

Where one pass gives the log-probabilities of all levels, a SID's score is a sum of L numbers, so
the whole catalogue is ranked and no prefix is ever dropped. Blocks of SIDs bound the memory,
whatever the catalogue's size. Knows a prefix index as a list of SIDs. Knows nothing about items.

Source: RPG (arXiv 2506.05781) scores by the mean over tokens; the sum orders alike and stays a
log-probability. Where we differ: every SID is scored, instead of a search on a graph of items.

Shapes: B users, S distinct SIDs, L levels, K codes of a level, W kept SIDs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from forge_ray.gr.beam import Beams, checked_log_probs, sort_keys
from forge_ray.gr.prefix_index import PrefixIndex

_SIDS = 1 << 13
"""SIDs scored at a time: 1 MB of scores for 32 users, which stay in the cache."""


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
    best = _Best(
        torch.empty(len(tokens), 0, device=by_token.device),
        torch.empty(len(tokens), 0, dtype=torch.int64, device=by_token.device),
    )
    for start in range(0, index.num_sids, _SIDS):
        rows = torch.arange(start, min(start + _SIDS, index.num_sids), device=by_token.device)
        scores = functional.embedding_bag(index.sids(rows) + starts, by_token, mode="sum")
        if best.scores.shape[1] == width:
            # Rows ascend, so a later SID of equal score loses: most SIDs are dropped for everyone.
            is_better = (scores > best.scores[:, -1]).any(dim=1)
            rows, scores = rows[is_better], scores[is_better]
        best = best.merged(scores.T, rows, width)
    return best.beams(index, width)


@dataclass(frozen=True, slots=True)
class _Best:
    """The best SIDs so far, best first: scores float32 and rows of the index int64, [B, kept]."""

    scores: Tensor
    rows: Tensor

    def merged(self, scores: Tensor, rows: Tensor, width: int) -> _Best:
        """The best of these and more SIDs: scores [B, n] of rows [n]."""
        scores = torch.cat([self.scores, scores], dim=1)
        rows = torch.cat([self.rows, rows.expand(len(scores), -1)], dim=1)
        slots = sort_keys(scores, rows).topk(min(width, rows.shape[1]), dim=1).indices
        return _Best(scores.gather(1, slots), rows.gather(1, slots))

    def beams(self, index: PrefixIndex, width: int) -> Beams:
        """With dead slots behind a catalogue smaller than the width."""
        missing = width - self.rows.shape[1]
        pad = functional.pad
        return Beams(
            codes=pad(index.sids(self.rows), (0, 0, 0, missing), value=-1),
            scores=pad(self.scores, (0, missing), value=-torch.inf),
            sid_rank=pad(self.rows, (0, missing), value=-1),
        )
