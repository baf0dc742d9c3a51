"""The item-kNN floor: untrained co-occurrence, the bar that a generator has to clear.

Pure NumPy and SciPy: blocks of users in, blocks of lists out. For the newest history items a with
age d = 0, 1, …:

    score(b) = Σ_d decay^d · co(a_d, b) / sqrt(n(a_d)·n(b)) + transition(a_0, b) / sqrt(n(a_0)·n(b))

where n counts train interactions, co counts ordered co-occurrences inside one user's train part and
transition counts one-step successions in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from forge_ray.data.ragged import Ragged
from forge_ray.evaluate.popularity import fill_popular, is_member, popularity_order


@dataclass(frozen=True)
class ItemCounts:
    """Item-to-item counts of the train part; add those of several blocks of users."""

    together: Any
    """csr [N, N] float64: ordered pairs of positions with these items inside one user."""
    next: Any
    """csr [N, N] float64: the column item directly follows the row item."""

    def __add__(self, other: ItemCounts) -> ItemCounts:
        """Counts over both blocks."""
        return ItemCounts(self.together + other.together, self.next + other.next)


def count_items(sequences: Ragged, num_items: int, *, max_length: int = 60) -> ItemCounts:
    """Count co-occurrences and successions in a block of users.

    Memory: at most `max_length ** 2` co-occurrences a user, merged; a block of 65,536 users of ten
    items takes below 100 MB.

    Args:
        sequences: train items of each user in time order.
        num_items: size N of the catalogue.
        max_length: users with more train items are skipped in the co-occurrences (not in the
            successions): their pairs grow with the square and say little.
    """
    users, items = sequences.row_ids, sequences.values.astype(np.int64)
    shape = (len(sequences), num_items)
    short = np.repeat(sequences.lengths <= max_length, sequences.lengths)
    baskets = sp.csr_array((np.ones(int(short.sum())), (users[short], items[short])), shape=shape)
    together = sp.csr_array(baskets.T @ baskets)
    together.setdiag(0)
    together.eliminate_zeros()
    at = np.flatnonzero(users[:-1] == users[1:])
    pairs = (items[at], items[at + 1])
    follows = sp.csr_array((np.ones(len(at)), pairs), shape=(num_items, num_items))
    return ItemCounts(together, follows)


@dataclass(frozen=True)
class ItemKnn:
    """Item-kNN recommender; memory 12 bytes for each co-occurring and succeeding pair."""

    similarity: Any
    """csr [N, N] float32: normalised co-occurrence."""
    succession: Any
    """csr [N, N] float32: normalised one-step transitions."""
    order: npt.NDArray[np.int64]
    """Items by popularity [N], the filler of short lists."""
    history: int
    """Newest history items that vote."""
    decay: float
    """Weight of one more step of age."""

    @classmethod
    def fit(
        cls,
        counts: ItemCounts,
        train_counts: npt.NDArray[np.integer[Any]],
        *,
        history: int = 10,
        decay: float = 0.7,
    ) -> ItemKnn:
        """Normalise counts by popularity.

        Args:
            counts: of the whole train part.
            train_counts: train interactions of each item [N].
            history: newest history items that vote.
            decay: weight of one more step of age.
        """
        scale = sp.diags_array(1.0 / np.sqrt(np.maximum(train_counts, 1)))
        together = sp.csr_array(scale @ counts.together @ scale, dtype=np.float32)
        follows = sp.csr_array(scale @ counts.next @ scale, dtype=np.float32)
        return cls(together, follows, popularity_order(train_counts), history, decay)

    def recommend(
        self, histories: Ragged, k: int, *, block_users: int = 1024
    ) -> npt.NDArray[np.int64]:
        """List the k best items that each user has not seen, short lists filled with popularity.

        Memory: the scored items of `block_users` users, about 40 bytes each.

        Args:
            histories: items of each user in time order, U rows.
            k: length of the lists.
            block_users: users scored at a time.

        Returns:
            int64 [U, k], equal scores by item index; −1 where the catalogue is exhausted.
        """
        lists = np.full((len(histories), k), -1, dtype=np.int64)
        for start in range(0, len(histories), block_users):
            rows = np.arange(start, min(start + block_users, len(histories)))
            seen = histories.take(rows)
            lists[rows] = fill_popular(self._rank(seen, k), seen, self.order)
        return lists

    def _rank(self, histories: Ragged, k: int) -> npt.NDArray[np.int64]:
        recent = histories.tail(self.history)
        age = np.repeat(recent.lengths, recent.lengths) - 1 - recent.positions
        scores = _weights(recent, self.decay**age, len(self.order)) @ self.similarity
        last = histories.tail(1)
        ones = np.ones(len(last.values))
        scores = sp.csr_array(scores + _weights(last, ones, len(self.order)) @ self.succession)
        scores.sort_indices()
        return _best_unseen(scores, histories, k)


def _weights(items: Ragged, weight: npt.NDArray[np.floating[Any]], num_items: int) -> Any:
    """Sparse [U, N] float32 with the weight of each history item."""
    triples = (weight.astype(np.float32), (items.row_ids, items.values.astype(np.int64)))
    return sp.csr_array(triples, shape=(len(items), num_items))


def _best_unseen(scores: Any, seen: Ragged, k: int) -> npt.NDArray[np.int64]:
    """Columns of the k largest positive entries of each row outside `seen`, −1 behind the last."""
    num_users, num_items = scores.shape
    rows = np.repeat(np.arange(num_users, dtype=np.int64), np.diff(scores.indptr))
    columns = scores.indices.astype(np.int64)
    blocked = np.unique(seen.row_ids * num_items + seen.values)
    kept = ~is_member(rows * num_items + columns, blocked) & (scores.data > 0)
    rows, columns = rows[kept], columns[kept]
    # Positive floats order like their bits: one integer key sorts by row, then by falling score;
    # the stable sort leaves equal scores in item order.
    falling = np.uint32(0xFFFFFFFF) - scores.data[kept].astype(np.float32).view(np.uint32)
    keys = (rows.astype(np.uint64) << np.uint64(32)) | falling.astype(np.uint64)
    order = np.argsort(keys, kind="stable")
    rows, columns = rows[order], columns[order]
    first = np.searchsorted(rows, np.arange(num_users))
    place = np.arange(len(rows)) - first[rows]
    best = np.full((num_users, k), -1, dtype=np.int64)
    top = place < k
    best[rows[top], place[top]] = columns[top]
    return best
