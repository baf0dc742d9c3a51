"""Exact ranks of held-out items when an item's score is a sum over its codes.

The whole catalogue is scored, block after block of distinct SIDs; nothing is pruned. Items of one
SID tie and stand in random order. Knows tables of per-level scores; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from forge_ray.data.ragged import Ragged
from forge_ray.sid.metrics.quality import prefix_ids

_SIDS = 1 << 14
"""Distinct SIDs scored at a time: 4 MB of scores for 64 users, which stay in the cache."""


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Distinct SIDs with the number of items on each."""

    tokens: torch.Tensor
    """int64 [S, L] global tokens: code plus the sizes of the levels before."""
    sizes: torch.Tensor
    """int64 [S] items on each SID."""
    sid_of: npt.NDArray[np.int64]
    """[N] which SID each item has."""

    @classmethod
    def of(
        cls, codes: npt.NDArray[np.integer[Any]], codebook_sizes: list[int], device: str
    ) -> Catalogue:
        """Group the items of a table.

        Args:
            codes: integer codes [N, L].
            codebook_sizes: codes per level, length L.
            device: where scores are computed.
        """
        ids = prefix_ids(codes)
        sid_of = ids.ids[-1]
        first = np.empty(ids.counts[-1], dtype=np.int64)
        first[sid_of] = np.arange(len(codes))
        tokens = np.asarray(codes[first], dtype=np.int64) + np.cumsum([0, *codebook_sizes[:-1]])
        sizes = np.bincount(sid_of)
        return cls(torch.from_numpy(tokens).to(device), torch.from_numpy(sizes).to(device), sid_of)


@dataclass(frozen=True)
class Ranks:
    """Places of held-out targets [M]."""

    ahead: npt.NDArray[np.int64]
    """Items before the target's SID, history items left out."""
    tied: npt.NDArray[np.int64]
    """Items on the target's SID, itself among them, history items left out."""
    bits: npt.NDArray[np.float64]
    """−log2 P(target): P(SID) normalised over the occupied ones, shared evenly among its items."""

    def item_hit(self, k: int) -> npt.NDArray[np.float64]:
        """Expected ItemHit@k of each target."""
        return np.clip(k - self.ahead, 0, self.tied) / self.tied

    def item_ndcg(self, k: int) -> npt.NDArray[np.float64]:
        """Expected ItemNDCG@k of each target."""
        gains = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))])
        start = np.minimum(self.ahead, k)
        end = np.minimum(self.ahead + self.tied, k)
        return np.asarray((gains[end] - gains[start]) / self.tied)


@torch.no_grad()
def rank_targets(
    level_scores: list[torch.Tensor],
    catalogue: Catalogue,
    histories: Ragged,
    targets: Ragged,
) -> Ranks:
    """Rank each user's targets among all items but those of the history.

    Args:
        level_scores: L tensors float32 [U, K_l] of log probabilities.
        catalogue: the items.
        histories: item indices, U rows; left out of the ranking, a target never is.
        targets: item indices, U rows.
    """
    table = torch.cat(level_scores, dim=1)
    device = table.device
    users = torch.from_numpy(targets.row_ids).to(device)
    own = torch.from_numpy(catalogue.sid_of[targets.values]).to(device)
    own_score = _sum_of_tokens(table, users, catalogue.tokens[own])
    ahead = torch.zeros(len(own), dtype=torch.int64, device=device)
    mass = torch.full((len(table),), -torch.inf, device=device)
    by_token = table.T.contiguous()
    for start in range(0, len(catalogue.sizes), _SIDS):
        rows = slice(start, start + _SIDS)
        scores = F.embedding_bag(catalogue.tokens[rows], by_token, mode="sum")
        mass = torch.logaddexp(mass, scores.logsumexp(dim=0))
        is_ahead = scores[:, users] > own_score
        inside = torch.nonzero((own >= start) & (own < start + len(scores))).ravel()
        is_ahead[own[inside] - start, inside] = False
        ahead += _items(is_ahead, catalogue.sizes[rows])
    seen = _seen(histories, targets, own_score, table, catalogue)
    share = (own_score - mass[users]).double().cpu().numpy()
    sizes = catalogue.sizes[own].cpu().numpy()
    return Ranks(
        ahead=ahead.cpu().numpy() - seen.ahead,
        tied=sizes - seen.tied,
        bits=-share / np.log(2.0) + np.log2(sizes),
    )


def _items(is_ahead: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Items on the marked SIDs, for each column; most SIDs hold one."""
    count = is_ahead.sum(dim=0)
    crowded = torch.nonzero(sizes > 1).ravel()
    if len(crowded):
        more = is_ahead[crowded] * (sizes[crowded, None] - 1)
        count = count + more.sum(dim=0)
    return count


@dataclass(frozen=True)
class _Seen:
    ahead: npt.NDArray[np.int64]
    tied: npt.NDArray[np.int64]


def _seen(
    histories: Ragged,
    targets: Ragged,
    own_score: torch.Tensor,
    table: torch.Tensor,
    catalogue: Catalogue,
) -> _Seen:
    """History items that the full ranking counted ahead of each target, or inside its tie."""
    rows = histories.take(targets.row_ids)
    width = np.int64(len(catalogue.sid_of))
    keys = np.unique(rows.row_ids * width + rows.values)
    target, item = keys // width, keys % width
    is_other = item != targets.values[target]
    target, item = target[is_other], item[is_other]
    sid = catalogue.sid_of[item]
    is_tied = sid == catalogue.sid_of[targets.values[target]]
    where = torch.from_numpy(target).to(table.device)
    users = torch.from_numpy(targets.row_ids[target]).to(table.device)
    tokens = catalogue.tokens[torch.from_numpy(sid).to(table.device)]
    scores = _sum_of_tokens(table, users, tokens)
    is_ahead = (scores > own_score[where]).cpu().numpy() & ~is_tied
    count = len(targets.values)
    return _Seen(
        np.bincount(target[is_ahead], minlength=count),
        np.bincount(target[is_tied], minlength=count),
    )


def _sum_of_tokens(table: torch.Tensor, users: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    # Added level by level as `embedding_bag` does: equal SIDs must get equal bits.
    total = table[users, tokens[:, 0]]
    for level in range(1, tokens.shape[1]):
        total = total + table[users, tokens[:, level]]
    return total
