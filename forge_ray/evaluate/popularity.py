"""The popularity floor: recommend what most people took, except what the user has already seen.

Pure NumPy; also the filler of every other baseline whose lists come out short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.data.ragged import Ragged
from forge_ray.data.sorted_arrays import is_member

_BLOCK_CELLS = 1 << 22
"""(user, candidate) cells examined at a time: bounds memory to about 100 MB."""


def popularity_order(train_counts: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Sort items by train count, most popular first, equal counts by item index. int64 [N].

    Args:
        train_counts: train interactions of each item [N].
    """
    return np.argsort(-train_counts.astype(np.int64), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Popularity:
    """Recommends the same items to everyone, but those already seen."""

    order: npt.NDArray[np.int64]
    """`popularity_order(...)` [N]."""

    def recommend(
        self, histories: Ragged, k: int, *, exclude_seen: bool = True
    ) -> npt.NDArray[np.int64]:
        """List the k most popular items.

        Args:
            histories: items of each user, U rows.
            k: length of the lists.
            exclude_seen: whether items of the history are kept out.

        Returns:
            int64 [U, k], −1 where the catalogue is exhausted.
        """
        hidden = histories if exclude_seen else histories.head(0)
        return fill_popular(np.full((len(histories), k), -1, dtype=np.int64), hidden, self.order)


def fill_popular(
    ranked: npt.NDArray[np.int64], seen: Ragged, order: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Complete short lists with the most popular items that are neither seen nor listed.

    Args:
        ranked: item index [U, K], −1 behind the last item of a short list.
        seen: items of each user's history, U rows.
        order: `popularity_order(...)` [N].

    Returns:
        int64 [U, K]; −1 remains only where the catalogue is exhausted.
    """
    filled = ranked.copy()
    width = ranked.shape[1]
    short = np.flatnonzero(ranked[:, -1] < 0)
    if len(short) == 0:
        return filled
    # Enough for K new items even if all listed and seen items are among the most popular ones.
    depth = min(2 * width + int(seen.lengths[short].max()), len(order))
    step = max(1, _BLOCK_CELLS // depth)
    for start in range(0, len(short), step):
        rows = short[start : start + step]
        filled[rows] = _fill_block(ranked[rows], seen.take(rows), order[:depth], len(order))
    return filled


def _fill_block(
    ranked: npt.NDArray[np.int64],
    seen: Ragged,
    candidates: npt.NDArray[np.int64],
    num_items: int,
) -> npt.NDArray[np.int64]:
    row, column = np.nonzero(ranked >= 0)
    listed = row * num_items + ranked[row, column]
    taken = np.unique(np.concatenate((listed, seen.row_ids * num_items + seen.values)))
    keys = np.arange(len(ranked))[:, None] * num_items + candidates
    is_free = ~is_member(keys, taken)
    have = (ranked >= 0).sum(axis=1)
    place = have[:, None] + np.cumsum(is_free, axis=1) - 1
    row, column = np.nonzero(is_free & (place < ranked.shape[1]))
    filled = ranked.copy()
    filled[row, place[row, column]] = candidates[column]
    return filled
