"""Running figures of one ranker over users: metrics by slice, coverage, bootstrap replicates.

What every row of a table is made of, models and baselines alike. Memory does not grow with users,
and boards of several parts of a split add up to the board of the whole. Knows places of targets and
item lists; knows nothing about how either was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.data.ragged import Ragged
from forge_ray.evaluate.bootstrap import Replicates, interval
from forge_ray.evaluate.ranking import Integers, MetricTotals, Places, list_places, target_slices


@dataclass(frozen=True)
class Ranked:
    """What a ranker says of U users and their M targets."""

    places: Places
    """Where the targets stand; those in one bucket tie."""
    lists: Integers
    """Item index [U, K], best first, ties in a stated order, −1 behind the last of a short list."""
    is_sid: bool = False
    """Whether SIDs were ranked: then the lists' own figures stand beside the expected ones."""
    emitted: int = 0
    """SIDs that a model put out."""
    invalid: int = 0
    """Those of them that no item owns."""
    seconds: float = 0.0
    """Time of ranking."""


class Coverage:
    """Which items stood within each cut-off of somebody's list.

    Users who are added are held as the distinct items of their lists, at most users x k, and that
    is what travels from a part; only a coverage that others are merged into has a place per item.
    """

    _added: npt.NDArray[np.int64]
    """Sorted `item x cut-offs + cut-off`, one for each item: the number of its smallest cut-off."""
    _merged: npt.NDArray[np.unsignedinteger[Any]] | None
    """Smallest cut-off of each item [N], the number of cut-offs where it was in no list."""

    def __init__(self, ks: Sequence[int], num_items: int) -> None:
        """Start without lists.

        Args:
            ks: cut-offs, ascending.
            num_items: N.
        """
        self._ks = list(ks)
        self._num_items = num_items
        self._added = np.empty(0, np.int64)
        self._merged = None

    def add(self, lists: Integers) -> None:
        """Add users by their lists [U, K], −1 behind the last item of a short one."""
        heads = lists[:, : self._ks[-1]]
        cut_off = np.searchsorted(self._ks, np.arange(heads.shape[1]), side="right")
        keys = (heads.astype(np.int64) * len(self._ks) + cut_off)[heads >= 0]
        keys = np.sort(np.concatenate([self._added, keys]))
        is_first = np.diff(keys // len(self._ks), prepend=-1) > 0
        self._added = keys[is_first]

    def merge(self, other: Coverage) -> None:
        """Add the users of another part."""
        merged = self._all()
        items, cut_off = np.divmod(other._added, len(self._ks))
        merged[items] = np.minimum(merged[items], cut_off)
        if other._merged is not None:
            np.minimum(merged, other._merged, out=merged)
        self._added, self._merged = np.empty(0, np.int64), merged

    def shares(self) -> dict[int, float]:
        """By cut-off, the share of the catalogue in at least one list."""
        found = self._added % len(self._ks) if self._merged is None else self._all()
        counts = {k: np.count_nonzero(found <= place) for place, k in enumerate(self._ks)}
        return {k: int(count) / self._num_items for k, count in counts.items()}

    def _all(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        merged = self._merged
        if merged is None:
            merged = np.full(self._num_items, len(self._ks), np.min_scalar_type(len(self._ks)))
        items, cut_off = np.divmod(self._added, len(self._ks))
        merged[items] = np.minimum(merged[items], cut_off)
        return merged


class Board:
    """See the module docstring.

    Conventions: `ItemHit@k` and `ItemNDCG@k` take the expectation over the order of items that
    share a SID; `HR@k` and `ListNDCG@k` score the written list, in its stated order. `HR@k` is
    FORGE's macro hit rate: the mean over users of the share of a user's true items among the first
    k items, invalid SIDs dropped. Source: arXiv 2509.20904, its code since November 2025.
    """

    totals: MetricTotals
    coverage: Coverage
    replicates: Replicates | None
    """None without bootstrap."""

    def __init__(
        self,
        train_counts: Integers,
        ks: Sequence[int],
        *,
        tail_max_count: int = 5,
        bootstrap: int = 0,
    ) -> None:
        """Start without users.

        Args:
            train_counts: train interactions of each item [N].
            ks: cut-offs.
            tail_max_count: train interactions up to which an item belongs to the tail.
            bootstrap: replicates; 0 for none.
        """
        self.totals = MetricTotals()
        self.ks = sorted(set(ks))
        self.coverage = Coverage(self.ks, len(train_counts))
        self.replicates = Replicates(bootstrap) if bootstrap else None
        self._tail_max_count = tail_max_count
        self._users = self._short_users = self._emitted = self._invalid = 0
        self._seconds = 0.0

    def add(
        self,
        user_index: npt.NDArray[np.int64],
        targets: Ragged,
        ranked: Ranked,
        train_counts: Integers,
    ) -> None:
        """Add users.

        Args:
            user_index: int64 [U], the dataset's own numbers.
            targets: U rows of distinct held-out items, M in all, those that `ranked` placed.
            ranked: of the same users.
            train_counts: train interactions of each item [N].
        """
        listed = list_places(ranked.lists, targets, self.ks) if ranked.is_sid else ranked.places
        whole = np.ones(len(targets.values), dtype=bool)
        metrics = self._metrics(ranked, listed, whole)
        self.totals.add(metrics)
        slices = target_slices(targets, train_counts, tail_max_count=self._tail_max_count)
        for name, mask in slices.items():
            if mask.any():
                self.totals.add(self._metrics(ranked, listed, mask), name)
        if self.replicates is not None:
            self.replicates.add(user_index, metrics)
        self._count(ranked)

    def merge(self, other: Board) -> None:
        """Add the users of another part of the same evaluation."""
        self.totals.merge(other.totals)
        self.coverage.merge(other.coverage)
        if self.replicates is not None and other.replicates is not None:
            self.replicates.merge(other.replicates)
        self._users += other._users
        self._short_users += other._short_users
        self._emitted += other._emitted
        self._invalid += other._invalid
        self._seconds += other._seconds

    def summary(self) -> dict[str, float]:
        """Means over all users so far.

        Returns:
            Every metric overall, with `_se` and, with bootstrap, `_low` and `_high` of its 95 %
            interval, and by slice as `ItemHit@10/tail`; `coverage@k`, the share of the catalogue in
            at least one list of k; `invalid_rate`, the share of emitted SIDs that no item owns;
            `short_rate`, the share of users whose list ends before max(ks) items; `users`,
            `users_per_s` (ranking only).
        """
        found = self.totals.summary()
        if self.replicates is not None:
            for name, values in zip(self.replicates.names, self.replicates.means(), strict=True):
                bounds = interval(values)
                found |= {f"{name}_low": bounds.low, f"{name}_high": bounds.high}
        found |= {f"coverage@{k}": share for k, share in self.coverage.shares().items()}
        found["invalid_rate"] = self._invalid / max(1, self._emitted)
        found["short_rate"] = self._short_users / max(1, self._users)
        found["users_per_s"] = self._users / max(self._seconds, 1e-9)
        return found

    def _metrics(
        self, ranked: Ranked, listed: Places, mask: npt.NDArray[np.bool_]
    ) -> dict[str, npt.NDArray[np.float64]]:
        expected = ranked.places.take(mask).metrics(self.ks)
        stated = listed.take(mask).metrics(self.ks)
        names = {"ItemHit": "HR", "ItemNDCG": "ListNDCG"} if ranked.is_sid else {"ItemHit": "HR"}
        for name, values in stated.items():
            family, _, k = name.partition("@")
            if family in names:
                expected[f"{names[family]}@{k}"] = values
        return expected

    def _count(self, ranked: Ranked) -> None:
        self.coverage.add(ranked.lists)
        self._users += len(ranked.lists)
        self._short_users += int((ranked.lists[:, -1] < 0).sum())
        self._emitted += ranked.emitted
        self._invalid += ranked.invalid
        self._seconds += ranked.seconds
