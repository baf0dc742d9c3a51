"""Item-level evaluation of a generator: decode, expand to items, score, slice.

Knows how beams, buckets and the ranking metrics fit together. Knows nothing about training, files
or Ray, so the trainer's validation and the command line share it.

Conventions: metrics take the expectation over the order of items that share a SID (``ItemHit@k``,
``ItemNDCG@k``, ``methods.md`` 8.1); ``ListHit@k`` and ``ListNDCG@k`` score the list that `gr
recommend` would write, with popularity order inside a bucket; ``SidHit@k`` is the SID-level figure,
for reference only. Items of the history are never recommended, so a target inside the history is a
miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError, DataError
from forge_ray.evaluate.ranking import (
    MetricTotals,
    bucket_metrics,
    distinct_items,
    ranked_metrics,
    tail_slices,
)
from forge_ray.gr.beam import StepwiseGenerator, default_widths
from forge_ray.gr.buckets import ItemBuckets
from forge_ray.gr.decoding import DecodedUsers, SidDecoder
from forge_ray.sid.table import SidTable

DEFAULT_KS = (5, 10, 20, 100)


def evaluate_generator(
    generator: StepwiseGenerator,
    table: SidTable,
    histories: Ragged,
    targets: Ragged,
    *,
    train_counts: NDArray[np.integer[Any]],
    max_history: int,
    ks: Sequence[int] = DEFAULT_KS,
    widths: Sequence[int] | None = None,
    exclude_seen: bool = True,
    batch_users: int = 32,
    constrained: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Score a generator on users that fit in memory; see `Evaluator` for streams of them.

    Args:
        generator: a model on ``device``; its training mode is restored afterwards.
        table: SIDs of all items, the ones the model was trained with.
        histories: U rows of item indices, oldest first.
        targets: U rows of held-out items, at least one each.
        train_counts: int [N], interactions of each item in the train part.
        max_history: newest items of a history that the model reads.
        ks: cut-offs.
        widths: beams to keep after each level; by default `default_widths`.
        exclude_seen: whether items of the (whole) history are kept out of the lists.
        batch_users: users per search.
        constrained: False measures the model without the prefix index.
        device: where the search runs.

    Returns:
        `Evaluator.summary`.
    """
    chosen = tuple(widths or default_widths(table.num_levels, max_k=max(ks)))
    decoder = SidDecoder(
        generator,
        table,
        widths=chosen,
        max_history=max_history,
        batch_users=batch_users,
        constrained=constrained,
        device=device,
    )
    evaluator = Evaluator(decoder, train_counts=train_counts, ks=ks, exclude_seen=exclude_seen)
    evaluator.add(histories, targets)
    return evaluator.summary()


@dataclass
class _Counters:
    """What is counted beside the metrics."""

    users: int = 0
    short_users: int = 0
    emitted: int = 0
    invalid: int = 0
    seconds: float = 0.0


class Evaluator:
    """Running evaluation over batches of users; memory does not grow with their number.

    Attributes:
        totals: metric sums; those of several evaluators can be merged.
        shown: bool [N] for each cut-off, items that were in somebody's list.
    """

    totals: MetricTotals
    shown: dict[int, NDArray[np.bool_]]

    def __init__(
        self,
        decoder: SidDecoder,
        *,
        train_counts: NDArray[np.integer[Any]],
        ks: Sequence[int] = DEFAULT_KS,
        exclude_seen: bool = True,
    ) -> None:
        """Group the items by SID.

        Raises:
            ConfigError: the beams are fewer than the longest list needs.
        """
        num_sids = decoder.index.num_sids
        if decoder.widths[-1] < min(max(ks), num_sids):
            raise ConfigError(
                f"widths must end in at least max(ks)={max(ks)} beams, got {list(decoder.widths)}. "
                "Widen the last level or lower ks."
            )
        self.totals = MetricTotals()
        self.shown = {k: np.zeros(len(train_counts), bool) for k in sorted(ks)}
        self._decoder = decoder
        self._ks = sorted(ks)
        self._exclude_seen = exclude_seen
        self._train_counts = np.asarray(train_counts, np.int64)
        self._buckets = ItemBuckets.build(
            decoder.item_rank(), num_sids=num_sids, train_counts=self._train_counts
        )
        self._counters = _Counters()

    def add(self, histories: Ragged, targets: Ragged) -> None:
        """Decode and score some users.

        Args:
            histories: U rows of item indices.
            targets: U rows of held-out items, at least one each; repeats count once.

        Raises:
            DataError: the rows do not match.
        """
        if len(histories) != len(targets):
            raise DataError(
                f"targets must have one row per history ({len(histories)}), got {len(targets)}. "
                "Read both from the same split."
            )
        decoded = self._decoder.decode(histories)
        wanted = distinct_items(targets, len(self._train_counts))
        sizes = self._unseen_sizes(decoded.sid_rank, histories)
        metrics = bucket_metrics(
            sizes, self._target_beam(decoded.sid_rank, histories, wanted), wanted.row_ids, self._ks
        )
        lists = self._buckets.expand(
            decoded.sid_rank,
            decoded.scores,
            k=self._ks[-1],
            seen=histories if self._exclude_seen else None,
        )
        exact = ranked_metrics(lists.items, wanted, self._ks)
        metrics |= {name.replace("Item", "List"): values for name, values in exact.items()}
        self.totals.add(metrics, tail_slices(wanted, self._train_counts))
        self._count(decoded, lists.items)

    def summary(self) -> dict[str, float]:
        """Means over all users so far.

        Returns:
            Every metric overall, with `_se`, and by slice as `ItemHit@10/tail`; `coverage@k`, the
            share of the catalogue in at least one list of k; `invalid_rate`, the share of emitted
            SIDs that no item owns; `short_rate`, the share of users whose list ends before max(ks)
            items; `users`, `users_per_s` (decoding only).
        """
        counters = self._counters
        found = self.totals.summary()
        found |= {f"coverage@{k}": float(mask.mean()) for k, mask in self.shown.items()}
        found["invalid_rate"] = counters.invalid / max(1, counters.emitted)
        found["short_rate"] = counters.short_users / max(1, counters.users)
        found["users_per_s"] = counters.users / max(counters.seconds, 1e-9)
        return found

    def _unseen_sizes(self, sid_rank: NDArray[np.int32], histories: Ragged) -> NDArray[np.int64]:
        sizes = self._buckets.sizes(sid_rank)
        if not self._exclude_seen:
            return sizes
        return sizes - self._buckets.seen_sizes(sid_rank, histories)

    def _target_beam(
        self, sid_rank: NDArray[np.int32], histories: Ragged, targets: Ragged
    ) -> NDArray[np.int64]:
        """Beam that holds each target [M], -1 where none does or the target must not be shown."""
        users = targets.row_ids
        at = sid_rank[users] == self._buckets.item_rank[targets.values][:, None]
        beam = np.where(at.any(axis=1), at.argmax(axis=1), -1)
        if not self._exclude_seen:
            return beam
        keys = users * self._buckets.num_items + targets.values
        return np.where(np.isin(keys, self._buckets.history_keys(histories)), -1, beam)

    def _count(self, decoded: DecodedUsers, items: NDArray[np.int64]) -> None:
        for k, mask in self.shown.items():
            head = items[:, :k]
            mask[head[head >= 0]] = True
        counters = self._counters
        counters.users += len(items)
        counters.short_users += int((items[:, -1] < 0).sum())
        counters.emitted += decoded.num_emitted
        counters.invalid += decoded.num_invalid
        counters.seconds += decoded.seconds
