"""Ranking metrics at item level, also when several items share one SID.

Pure NumPy: ranked lists and targets in, one figure per user out. A hit on a SID is not a hit on an
item: an item of a bucket of G items is shown at an expected place among them. `SidHit` is reported
as a reference only; it rewards collisions and must not be optimised.

Conventions: a user's metric is macro-averaged over the user's targets. `ItemHit@k` is the share of
the targets among the first k items; `ItemNDCG@k` divides the discounted gain by that of the ideal
list of min(targets, k) hits. With one target they are the usual Hit and NDCG. A slice holds some of
the targets; a user counts in it with those alone.

Source: collision-aware evaluation after CollisionGenRec (arXiv 2605.25330); macro-averaged hit
rate as in FORGE (arXiv 2509.20904) since November 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.data.ragged import Ragged
from forge_ray.errors import DataError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer[Any]]

OVERALL = "overall"
_CELLS_AT_ONCE = 1 << 26


def distinct_items(rows: Ragged, num_items: int) -> Ragged:
    """Leave repeats out of each row, in item order: a target taken twice is one target.

    Args:
        rows: item indices.
        num_items: catalogue size N.
    """
    users, items = np.divmod(np.unique(rows.row_ids * num_items + rows.values), num_items)
    return Ragged.from_lengths(items, np.bincount(users, minlength=len(rows)))


@dataclass(frozen=True)
class Places:
    """Where the M targets of U users stand in the users' rankings."""

    before: Integers
    """Items ahead of the target's bucket [M], −1 where the target is not listed."""
    size: Integers
    """Items of the target's bucket, itself among them [M], >= 1; 1 in plain lists."""
    user: Integers
    """User of each target [M], 0..U−1."""
    sid_rank: Integers | None = None
    """SIDs ahead of the target's [M]; None in plain lists."""

    def take(self, targets: npt.NDArray[np.bool_]) -> Places:
        """The targets of a mask [M]; their users are numbered anew, others are left out."""
        _, user = np.unique(self.user[targets], return_inverse=True)
        rank = None if self.sid_rank is None else self.sid_rank[targets]
        return Places(self.before[targets], self.size[targets], user, rank)

    def metrics(self, ks: Sequence[int]) -> dict[str, Floats]:
        """Score the targets, in expectation over the order inside a bucket.

        Args:
            ks: cut-offs.

        Returns:
            `ItemHit@k` and `ItemNDCG@k`; `SidHit@k` where SIDs were ranked. float64 [U] each.
        """
        per_user = np.bincount(self.user)
        found = _user_metrics(self.before, self.size, self.user, per_user, ks)
        if self.sid_rank is None:
            return found
        for k in ks:
            hit = (self.before >= 0) & (self.sid_rank < k)
            found[f"SidHit@{k}"] = np.bincount(self.user, weights=hit) / per_user
        return found


def list_places(ranked_items: Integers, targets: Ragged, ks: Sequence[int]) -> Places:
    """Find targets in plain item lists.

    Args:
        ranked_items: item index [U, K], best first, −1 where a list is short. No item twice.
        targets: target items of each user, U rows of at least one distinct item.
        ks: cut-offs, each <= K.

    Raises:
        DataError: a user has no target, or a cut-off exceeds the lists.
    """
    _check(targets, ranked_items.shape[1], ks)
    user = targets.row_ids
    # A target at place r is a bucket of one item behind r others.
    place = first_places(ranked_items, user, targets.values)
    return Places(place, np.ones(len(user), dtype=np.int64), user)


def first_places(rows: Integers, row: Integers, wanted: Integers) -> npt.NDArray[np.int64]:
    """Column of the first equal entry in a row for each wanted value, int64 [M]; -1: there is none.

    Memory beside the result: 64 MiB, however many values a row is searched for.

    Args:
        rows: [U, K].
        row: which of them [M].
        wanted: what to find in it [M].
    """
    found = np.empty(len(row), dtype=np.int64)
    step = max(1, _CELLS_AT_ONCE // max(1, rows.shape[1]))
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        at = rows[row[part]] == wanted[part, None]
        found[part] = np.where(at.any(axis=1), at.argmax(axis=1), -1)
    return found


def bucket_places(beam_sizes: Integers, target_beam: Integers, target_user: Integers) -> Places:
    """Find targets in lists of SIDs.

    Args:
        beam_sizes: items that each beam's SID holds for this user [U, W], best beam first; items
            that are not to be recommended (already seen) are subtracted; dead beams hold 0.
        target_beam: beam whose SID holds the target [M], −1 if there is none.
        target_user: user of each target [M]; every user has at least one.

    Raises:
        DataError: a user has no target.
    """
    _check_targets(np.bincount(target_user, minlength=len(beam_sizes)))
    sizes = beam_sizes.astype(np.int64)
    before = np.cumsum(sizes, axis=1) - sizes
    beam = np.maximum(target_beam, 0)
    size = sizes[target_user, beam]
    is_found = (target_beam >= 0) & (size > 0)
    # Beams without items (dead, or all seen) take no place, else SidHit could fall below ItemHit.
    is_live = sizes > 0
    rank: Integers = (np.cumsum(is_live, axis=1) - is_live)[target_user, beam]
    place = np.where(is_found, before[target_user, beam], -1)
    return Places(place, np.maximum(size, 1), target_user, rank)


def ranked_metrics(ranked_items: Integers, targets: Ragged, ks: Sequence[int]) -> dict[str, Floats]:
    """Score plain item lists; arguments as in `list_places`.

    Returns:
        `ItemHit@k` and `ItemNDCG@k`, float64 [U] each.
    """
    return list_places(ranked_items, targets, ks).metrics(ks)


def bucket_metrics(
    beam_sizes: Integers,
    target_beam: Integers,
    target_user: Integers,
    ks: Sequence[int],
) -> dict[str, Floats]:
    """Score lists of SIDs by the items they stand for; arguments as in `bucket_places`.

    With P items before the target's SID, G items on it and m = min(G, max(0, k − P)):
    `ItemHit@k = m / G` and `ItemNDCG@k = (1/G) Σ_{i=1..m} 1/log2(P + i + 1)`. Exact only for
    k <= the items on all beams; `W >= k` guarantees it when no beam is empty.

    Returns:
        `ItemHit@k`, `ItemNDCG@k` and, for reference, `SidHit@k` (the target's SID is among the
        first k that hold items), float64 [U] each.
    """
    return bucket_places(beam_sizes, target_beam, target_user).metrics(ks)


def _user_metrics(
    place: Integers, size: Integers, user: Integers, per_user: Integers, ks: Sequence[int]
) -> dict[str, Floats]:
    """Metrics from the items before each target's bucket (−1: absent) and the bucket's size."""
    deepest = max(ks)
    discount = 1.0 / np.log2(np.arange(deepest) + 2.0)
    gain = np.concatenate(([0.0], np.cumsum(discount)))  # gain[j]: hits on the first j places
    start = np.where(place < 0, deepest, np.minimum(place, deepest))
    found: dict[str, Floats] = {}
    for k in ks:
        first = np.minimum(start, k)
        last = np.minimum(first + size, k)
        hits = (last - first) / size
        gains = (gain[last] - gain[first]) / size
        ideal = gain[np.minimum(per_user, k)]
        found[f"ItemHit@{k}"] = np.bincount(user, hits, minlength=len(per_user)) / per_user
        found[f"ItemNDCG@{k}"] = np.bincount(user, gains, minlength=len(per_user)) / ideal
    return found


def _check(targets: Ragged, width: int, ks: Sequence[int]) -> None:
    _check_targets(targets.lengths)
    if max(ks) > width:
        raise DataError(
            f"ranked lists must be as long as the largest cut-off {max(ks)}, got {width}. "
            "Rank more items or lower `ks`."
        )


def _check_targets(per_user: Integers) -> None:
    if (per_user == 0).any():
        raise DataError(
            f"every evaluated user must have a target, got {int((per_user == 0).sum())} without. "
            "Drop these users first."
        )


def target_slices(
    targets: Ragged, train_counts: Integers, *, tail_max_count: int = 5
) -> dict[str, npt.NDArray[np.bool_]]:
    """Split targets by their popularity.

    Args:
        targets: target items of each user, M in all.
        train_counts: train interactions of each item [N].
        tail_max_count: an item with at most this many train interactions belongs to the tail.

    Returns:
        Masks [M]: `head`, `tail`, and `cold`, the part of the tail without a train interaction.
    """
    count = train_counts[targets.values]
    return {
        "head": count > tail_max_count,
        "tail": count <= tail_max_count,
        "cold": count == 0,
    }


@dataclass
class MetricTotals:
    """Running sums of per-user metrics, by slice: constant memory, mergeable across workers."""

    counts: dict[str, int] = field(default_factory=dict)
    """Users of each slice."""
    sums: dict[tuple[str, str], float] = field(default_factory=dict)
    """Sum over users, by (slice, metric)."""
    squares: dict[tuple[str, str], float] = field(default_factory=dict)
    """Sum of squares over users, by (slice, metric)."""

    def add(self, metrics: Mapping[str, Floats], name: str = OVERALL) -> None:
        """Add users.

        Args:
            metrics: per-user values [U] by name.
            name: of the slice.
        """
        self.counts[name] = self.counts.get(name, 0) + len(next(iter(metrics.values())))
        for metric, values in metrics.items():
            key = (name, metric)
            self.sums[key] = self.sums.get(key, 0.0) + float(values.sum())
            self.squares[key] = self.squares.get(key, 0.0) + float((values**2).sum())

    def merge(self, other: MetricTotals) -> None:
        """Add the users of another total."""
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for key, value in other.sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.squares[key] = self.squares.get(key, 0.0) + other.squares[key]

    def summary(self) -> dict[str, float]:
        """Means by name: `ItemHit@10`, `ItemHit@10/tail`, `ItemHit@10_se`, `users`, `users/tail`.

        A slice without users is left out. `_se` is the standard error of the overall mean over
        users.
        """
        found: dict[str, float] = {}
        for (name, metric), total in self.sums.items():
            count = self.counts[name]
            if count == 0:
                continue
            suffix = "" if name == OVERALL else f"/{name}"
            found[f"{metric}{suffix}"] = total / count
            if name == OVERALL:
                found[f"{metric}_se"] = self._standard_error(name, metric)
        for name, count in self.counts.items():
            found["users" if name == OVERALL else f"users/{name}"] = count
        return found

    def _standard_error(self, name: str, metric: str) -> float:
        count = self.counts[name]
        if count < 2:
            return float("nan")
        mean = self.sums[name, metric] / count
        spread = max(self.squares[name, metric] / count - mean**2, 0.0)
        return float(np.sqrt(spread / (count - 1)))
