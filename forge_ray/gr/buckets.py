"""From ranked SIDs to items: which items share a SID, and which of them a user has not seen.

Knows the item-to-SID assignment and beams as ranks of distinct SIDs. Knows nothing about models,
metrics or files.

**Order inside a bucket**: train count descending, then item index ascending. It is a stated
convention, used wherever a list of items must be written out; the metrics take the expectation over
random order instead (``methods.md`` 8.1) and do not depend on it.

Shapes: B users, W beams, N items, S distinct SIDs, k items in a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged


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
        item_rank: int64 [N], the SID of each item as a rank among the sorted distinct SIDs.
        offsets: int64 [S + 1]; the items of SID s are ``items[offsets[s]:offsets[s + 1]]``.
        items: int64 [N], item indices grouped by SID, in the bucket order above.
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
            item_rank: int64 [N], from ``PrefixIndex.find``.
            num_sids: S.
            train_counts: int64 [N], interactions of each item in the train part.
        """
        order = np.lexsort((np.arange(len(item_rank)), -train_counts, item_rank))
        counts = np.bincount(item_rank, minlength=num_sids)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        return cls(item_rank, offsets, order)

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.items)

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
        keys, counts = np.unique(users * self.num_sids + self.item_rank[items], return_counts=True)
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
    ) -> RankedItems:
        """Replace each beam by its items and keep the first k of each user.

        Work is bounded by k plus the seen items per user, however large a bucket is.

        Args:
            sid_rank: integer [B, W], best first, -1 for dead beams.
            scores: float32 [B, W].
            k: length of the lists.
            seen: B rows of item indices to leave out; None leaves nothing out.
        """
        sizes = self.sizes(sid_rank)
        seen_sizes = np.zeros_like(sizes) if seen is None else self.seen_sizes(sid_rank, seen)
        unseen = sizes - seen_sizes
        needed = np.clip(k - (np.cumsum(unseen, axis=1) - unseen), 0, unseen)
        # The first needed + seen items of a bucket hold at least `needed` unseen ones.
        taken = np.where(needed > 0, np.minimum(sizes, needed + seen_sizes), 0)
        starts = self.offsets[np.maximum(sid_rank, 0)].ravel()
        items = Ragged(self.items, np.array([0, self.num_items])).slices(starts, taken.ravel())
        beams, values = items.row_ids, items.values
        users = beams // sid_rank.shape[1]
        if seen is not None:
            fresh = ~np.isin(users * self.num_items + values, self.history_keys(seen))
            beams, values, users = beams[fresh], values[fresh], users[fresh]
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
