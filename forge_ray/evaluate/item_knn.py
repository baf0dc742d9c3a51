"""The item-kNN floor: untrained co-occurrence, the bar that a generator has to clear.

Pure NumPy and SciPy: blocks of users in, blocks of lists out. For the newest history items a with
age d = 0, 1, …:

    score(b) = Σ_d decay^d · co(a_d, b) / sqrt(n(a_d)·n(b))
             + succession · transition(a_0, b) / sqrt(n(a_0)·n(b))

where n counts train interactions, co counts ordered co-occurrences inside one user's train part and
transition counts one-step successions in it. The floor is the stated constants; the tuned row has
those that rank the validation targets best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from forge_ray.data.ragged import Ragged
from forge_ray.data.sorted_arrays import is_member
from forge_ray.errors import ConfigError
from forge_ray.evaluate.popularity import fill_popular, popularity_order


@dataclass(frozen=True, kw_only=True)
class ItemKnnConfig:
    """How item-kNN votes; the defaults are the floor."""

    history: int = 10
    """Newest history items that vote."""
    decay: float = 0.7
    """Weight of one more step of age."""
    succession: float = 1.0
    """Weight of the items that directly followed the newest one."""
    max_length: int = 60
    """Train items above which a user is left out of the co-occurrences."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.history < 1 or self.max_length < 1:
            raise ConfigError(
                "item_knn.history and item_knn.max_length must be >= 1, got "
                f"{self.history} and {self.max_length}. Raise them."
            )
        if self.decay <= 0 or self.succession < 0:
            raise ConfigError(
                "item_knn.decay must be > 0 and item_knn.succession >= 0, got "
                f"{self.decay} and {self.succession}. Use e.g. 0.7 and 1."
            )


GRID: dict[str, tuple[float, ...]] = {
    "history": (1, 3, 5, 10, 20, 50),
    "decay": (0.3, 0.5, 0.7, 0.8, 0.9, 1.0),
    "succession": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0),
}
"""Values that tuning tries for each constant that needs no new counts."""
MAX_LENGTHS = (60, 200, 1000)
"""Values of `max_length` that tuning counts with; beyond 60 where users take hundreds of items."""
_ROUNDS = 2
_BLOCK_PAIRS = 1 << 24
"""Co-occurrences counted at a time: at most 200 MB, less what repeats."""


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

    Memory: at most `max_length ** 2` co-occurrences a user of 12 bytes each; `blocks_of_pairs` cuts
    blocks that bound their number.

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


def blocks_of_pairs(sequences: Ragged, *, max_length: int) -> Iterator[Ragged]:
    """Cut users into blocks of about `_BLOCK_PAIRS` co-occurrences, at most one user above it.

    Args:
        sequences: train items of each user.
        max_length: users with more of them have no co-occurrences.
    """
    lengths = sequences.lengths.astype(np.int64)
    pairs = np.cumsum(np.where(lengths <= max_length, lengths**2, 0))
    cuts = np.flatnonzero(np.diff(pairs // _BLOCK_PAIRS)) + 1
    for rows in np.split(np.arange(len(sequences)), cuts):
        yield sequences.take(rows)


@dataclass(frozen=True)
class ItemKnn:
    """Item-kNN recommender; memory 12 bytes for each co-occurring and succeeding pair."""

    similarity: Any
    """csr [N, N] float32: normalised co-occurrence."""
    succession: Any
    """csr [N, N] float32: normalised one-step transitions."""
    order: npt.NDArray[np.int64]
    """Items by popularity [N], the filler of short lists."""
    config: ItemKnnConfig

    @classmethod
    def fit(
        cls,
        counts: ItemCounts,
        train_counts: npt.NDArray[np.integer[Any]],
        config: ItemKnnConfig | None = None,
    ) -> ItemKnn:
        """Normalise counts by popularity.

        Args:
            counts: of the whole train part.
            train_counts: train interactions of each item [N].
            config: how items vote; the floor's by default.
        """
        scale = sp.diags_array(1.0 / np.sqrt(np.maximum(train_counts, 1)))
        together = sp.csr_array(scale @ counts.together @ scale, dtype=np.float32)
        follows = sp.csr_array(scale @ counts.next @ scale, dtype=np.float32)
        return cls(together, follows, popularity_order(train_counts), config or ItemKnnConfig())

    def recommend(
        self, histories: Ragged, k: int, *, exclude_seen: bool = True, block_users: int = 1024
    ) -> npt.NDArray[np.int64]:
        """List the k best items of each user, short lists filled with popularity.

        Memory: the scored items of `block_users` users, about 40 bytes each.

        Args:
            histories: items of each user in time order, U rows.
            k: length of the lists.
            exclude_seen: whether items of the history are kept out.
            block_users: users scored at a time.

        Returns:
            int64 [U, k], equal scores by item index; −1 where the catalogue is exhausted.
        """
        lists = np.full((len(histories), k), -1, dtype=np.int64)
        for start in range(0, len(histories), block_users):
            rows = np.arange(start, min(start + block_users, len(histories)))
            block = histories.take(rows)
            hidden = block if exclude_seen else block.head(0)
            found = _best_unseen(self._scores(block), hidden, k)
            lists[rows] = fill_popular(found, hidden, self.order)
        return lists

    def _scores(self, histories: Ragged) -> Any:
        recent = histories.tail(self.config.history)
        age = np.repeat(recent.lengths, recent.lengths) - 1 - recent.positions
        scores = _weights(recent, self.config.decay**age, len(self.order)) @ self.similarity
        last = histories.tail(1)
        weight = np.full(len(last.values), self.config.succession)
        scores = sp.csr_array(scores + _weights(last, weight, len(self.order)) @ self.succession)
        scores.sort_indices()
        return scores


def tune(starts: Iterable[ItemKnn], figure: Callable[[ItemKnn], float]) -> ItemKnnConfig:
    """Find constants by coordinate search over `GRID` from the best start, each in turn, twice.

    Args:
        starts: fitted, of distinct constants; two at a time are held where they are generated.
        figure: what a set of constants is worth on validation users; larger is better.

    Returns:
        The constants of the best figure seen.
    """
    worth, knn = max(((figure(one), one) for one in starts), key=itemgetter(0))
    best, known = knn.config, {knn.config: worth}
    for _ in range(_ROUNDS):
        for name, values in GRID.items():
            for value in values:
                tried = replace(best, **{name: type(getattr(best, name))(value)})
                if tried not in known:
                    known[tried] = figure(replace(knn, config=tried))
            best = max(known, key=known.__getitem__)
    return best


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
