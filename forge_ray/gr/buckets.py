"""From ranked SIDs to items: which items share a SID, and which of them a user has not seen.

Knows the item-to-SID assignment and beams as ranks of distinct SIDs. Knows nothing about models,
metrics or files.

**Order inside a bucket**: train count descending, then item index ascending; or, where an
`Affinity` is given, affinity descending, then that order. It is a stated convention, used wherever
a list of items must be written out; the metrics take the expectation over random order instead
(``methods.md`` 8.1) and do not depend on it.

Shapes: B users, W beams, N items, S distinct SIDs, k items in a list, M pairs of user and item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged


class Affinity(Protocol):
    """How much the users of a batch care for items, beyond the items' SIDs."""

    def __call__(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores float32 [M] of pairs: ``users`` [M] are rows of the batch, ``items`` [M]."""


@dataclass(frozen=True, slots=True)
class RankedItems:
    """Item lists, best first; short lists end in -1.

    Attributes:
        items: int64 [B, k], item index or -1.
        scores: float32 [B, k], log-probability of the item's SID, -inf where there is no item.
    """

    items: NDArray[np.int64]
    scores: NDArray[np.float32]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Items of each list, int64 [B]."""
        return (self.items >= 0).sum(axis=1)


@dataclass(frozen=True, slots=True)
class ItemBuckets:
    """The items of every distinct SID.

    Attributes:
        item_rank: int64 [N], the SID of each item as a rank among the sorted distinct SIDs; -1 for
            items that must not be shown.
        offsets: int64 [S + 1]; the items of SID s are ``items[offsets[s]:offsets[s + 1]]``.
        items: int64 [shown items], item indices grouped by SID, in the bucket order above.
    """

    item_rank: NDArray[np.int64]
    offsets: NDArray[np.int64]
    items: NDArray[np.int64]

    @classmethod
    def build(
        cls, item_rank: NDArray[np.int64], *, num_sids: int, train_counts: NDArray[np.int64]
    ) -> ItemBuckets:
        """Group items by SID with one sort.

        Args:
            item_rank: int64 [N], from ``SidDecoder.item_rank``; -1 is in no bucket.
            num_sids: S.
            train_counts: int64 [N], interactions of each item in the train part.
        """
        shown = np.flatnonzero(item_rank >= 0)
        order = shown[np.lexsort((-train_counts[shown], item_rank[shown]))]
        counts = np.bincount(item_rank[shown], minlength=num_sids)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        return cls(item_rank, offsets, order)

    @property
    def num_items(self) -> int:
        """N, items that are not shown included."""
        return len(self.item_rank)

    @property
    def num_sids(self) -> int:
        """S."""
        return len(self.offsets) - 1

    def sizes(self, sid_rank: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Items behind each beam, same shape as ``sid_rank``; 0 for -1."""
        known = np.maximum(sid_rank, 0)
        return np.where(sid_rank < 0, 0, self.offsets[known + 1] - self.offsets[known])

    def seen_sizes(
        self, sid_rank: NDArray[np.integer[Any]], histories: Ragged
    ) -> NDArray[np.int64]:
        """How many items behind each beam are in that user's history.

        Args:
            sid_rank: integer [B, W], -1 for dead beams.
            histories: B rows of item indices; repeats count once.

        Returns:
            int64 [B, W].
        """
        pairs = self.history_keys(histories)
        users, items = np.divmod(pairs, self.num_items)
        ranks = self.item_rank[items]
        own = (users * self.num_sids + ranks)[ranks >= 0]
        keys, counts = np.unique(own, return_counts=True)
        rows = np.arange(len(sid_rank), dtype=np.int64)[:, None]
        beams = np.where(sid_rank < 0, -1, rows * self.num_sids + sid_rank)
        if len(keys) == 0:
            return np.zeros(beams.shape, np.int64)
        slot = np.minimum(np.searchsorted(keys, beams), len(keys) - 1)
        return np.where(keys[slot] == beams, counts[slot], 0)

    def history_keys(self, histories: Ragged) -> NDArray[np.int64]:
        """Sorted distinct ``user x N + item`` of all history items, int64."""
        return np.unique(histories.row_ids * self.num_items + histories.values.astype(np.int64))

    def expand(
        self,
        sid_rank: NDArray[np.integer[Any]],
        scores: NDArray[np.float32],
        *,
        k: int,
        seen: Ragged | None = None,
        affinity: Affinity | None = None,
    ) -> RankedItems:
        """Replace each beam by its items and keep the first k of each user.

        Work is bounded by k plus the seen items per user, however large a bucket is; with an
        affinity every item of the buckets that are reached is scored.

        Args:
            sid_rank: integer [B, W], best first, -1 for dead beams.
            scores: float32 [B, W].
            k: length of the lists.
            seen: B rows of item indices to leave out; None leaves nothing out.
            affinity: orders the items of a bucket; None takes the order of the class.
        """
        sizes = self.sizes(sid_rank)
        seen_sizes = np.zeros_like(sizes) if seen is None else self.seen_sizes(sid_rank, seen)
        unseen = sizes - seen_sizes
        needed = np.clip(k - (np.cumsum(unseen, axis=1) - unseen), 0, unseen)
        # The first needed + seen items of a bucket hold at least `needed` unseen ones.
        enough = np.minimum(sizes, needed + seen_sizes) if affinity is None else sizes
        taken = np.where(needed > 0, enough, 0)
        starts = self.offsets[np.maximum(sid_rank, 0)].ravel()
        items = Ragged(self.items, np.array([0, len(self.items)])).slices(starts, taken.ravel())
        beams, values = items.row_ids, items.values
        users = beams // sid_rank.shape[1]
        if seen is not None:
            fresh = ~np.isin(users * self.num_items + values, self.history_keys(seen))
            beams, values, users = beams[fresh], values[fresh], users[fresh]
        if affinity is not None:
            # Stable: items of equal affinity keep the order of their bucket.
            order = np.lexsort((-affinity(users, values), beams))
            beams, values, users = beams[order], values[order], users[order]
        return _ranked(users, values, scores.ravel()[beams], shape=(len(sid_rank), k))


def _ranked(
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    scores: NDArray[np.float32],
    *,
    shape: tuple[int, int],
) -> RankedItems:
    """Scatter flat rows, ordered by user and rank, into a rectangle."""
    num_users, k = shape
    first = np.searchsorted(users, np.arange(num_users))
    place = np.arange(len(users)) - first[users]
    kept = place < k
    out = RankedItems(np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32))
    out.items[users[kept], place[kept]] = items[kept]
    out.scores[users[kept], place[kept]] = scores[kept]
    return out
