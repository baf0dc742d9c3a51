"""Item-level evaluation of ranked SIDs: decode, expand to items, find the targets.

Knows how beams and buckets make places of targets and item lists. Knows nothing about training,
files or Ray, so the trainer's validation, the command line and the Markov baseline share it.

Items of the history are never recommended, so a target inside the history is a miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError, DataError
from forge_ray.evaluate.board import Board, Ranked
from forge_ray.evaluate.config import DEFAULT_KS
from forge_ray.evaluate.ranking import bucket_places, distinct_items, first_places
from forge_ray.gr.beam import StepwiseGenerator, default_widths
from forge_ray.gr.buckets import ItemBuckets
from forge_ray.gr.decoding import DecodedUsers, SidDecoder
from forge_ray.gr.scripts import TaskText
from forge_ray.gr.tasks import HISTORIES, Prompts
from forge_ray.sid.table import SidTable

MAKES_ROOM = "at every level, at once"
"""How searches make room for seen items where no widths are given; stored figures are known by it,
since searches on tables whose last level hardly branches were narrower when this said less."""


class SidSearch(Protocol):
    """Ranks distinct SIDs for users; `SidDecoder` is one."""

    @property
    def widths(self) -> tuple[int, ...]:
        """SIDs kept after each level, before those are left out that hold nothing new."""

    def item_rank(self) -> NDArray[np.int64]:
        """SID of every item as a rank among the sorted distinct SIDs, int64 [N]."""

    def decode(self, histories: Ragged, queries: Sequence[str] | None = None) -> DecodedUsers:
        """Rank SIDs for every history, and what is asked for where there are queries."""


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
    queries: Sequence[str] | None = None,
    text: TaskText | None = None,
    prompts: Prompts = HISTORIES,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Score a generator on users that fit in memory; `gr.scoring` streams them.

    Args:
        generator: a model on ``device``; its training mode is restored afterwards.
        table: SIDs of all items, the ones the model was trained with.
        histories: U rows of item indices, oldest first.
        targets: U rows of held-out items, at least one each.
        train_counts: int [N], interactions of each item in the train part.
        max_history: newest items of a history that the model reads.
        ks: cut-offs.
        widths: beams to keep after each level; by default `default_widths`, with room for seen.
        exclude_seen: whether items of the (whole) history are kept out of the lists.
        batch_users: users per search.
        constrained: False measures the model without the prefix index.
        queries: U texts, what each user asks for; None asks for the next item.
        text: turns queries into questions.
        prompts: what the model learned to be asked with.
        device: where the search runs.

    Returns:
        `Board.summary`.

    Raises:
        DataError: histories and targets do not match.
    """
    wanted = _distinct_targets(histories, targets, len(train_counts))
    chosen = tuple(widths or default_widths(table.num_levels, max_k=max(ks)))
    decoder = SidDecoder(
        generator,
        table,
        widths=chosen,
        max_history=max_history,
        batch_users=batch_users,
        fills=max(ks) if exclude_seen and constrained and not widths else 0,
        constrained=constrained,
        text=text,
        prompts=prompts,
        device=device,
    )
    ranker = SidRanker(decoder, train_counts=train_counts, ks=ks, exclude_seen=exclude_seen)
    board, ranked = Board(train_counts, ks), ranker.rank(histories, wanted, queries)
    board.add(np.arange(len(histories)), wanted, ranked, train_counts)
    return board.summary()


def _distinct_targets(histories: Ragged, targets: Ragged, num_items: int) -> Ragged:
    if len(histories) != len(targets):
        raise DataError(
            f"targets must have one row per history ({len(histories)}), got {len(targets)}. "
            "Read both from the same split."
        )
    return distinct_items(targets, num_items)


class SidRanker:
    """A search over SIDs as a ranker of items; see `forge_ray.evaluate.evaluator.Ranker`."""

    def __init__(
        self,
        search: SidSearch,
        *,
        train_counts: NDArray[np.integer[Any]],
        ks: Sequence[int] = DEFAULT_KS,
        exclude_seen: bool = True,
        reads_queries: bool = True,
    ) -> None:
        """Group the items by SID.

        Args:
            search: ranks SIDs.
            train_counts: int [N], interactions of each item in the train part; orders a bucket.
            ks: cut-offs.
            exclude_seen: whether items of the history are kept out of the lists.
            reads_queries: False ranks by the histories alone, whatever is asked.

        Raises:
            ConfigError: the beams are fewer than the longest list needs.
        """
        item_rank = search.item_rank()
        num_sids = int(item_rank.max()) + 1
        if search.widths[-1] < min(max(ks), num_sids):
            raise ConfigError(
                f"widths must end in at least max(ks)={max(ks)} beams, got {list(search.widths)}. "
                "Widen the last level or lower ks."
            )
        self._search = search
        self._top_k = max(ks)
        self._exclude_seen = exclude_seen
        self._reads_queries = reads_queries
        self._buckets = ItemBuckets.build(
            item_rank, num_sids=num_sids, train_counts=np.asarray(train_counts, np.int64)
        )

    def rank(
        self, histories: Ragged, targets: Ragged, queries: Sequence[str] | None = None
    ) -> Ranked:
        """Decode some users and find their targets.

        Args:
            histories: U rows of item indices.
            targets: U rows of distinct held-out items, at least one each.
            queries: U texts, what each user asks for; None where nobody asks.
        """
        decoded = self._search.decode(histories, queries if self._reads_queries else None)
        lists = self._buckets.expand(
            decoded.sid_rank,
            decoded.scores,
            k=self._top_k,
            seen=histories if self._exclude_seen else None,
        )
        beam = self._target_beam(decoded.sid_rank, histories, targets)
        return Ranked(
            bucket_places(self._unseen_sizes(decoded.sid_rank, histories), beam, targets.row_ids),
            lists.items,
            is_sid=True,
            emitted=decoded.num_emitted,
            invalid=decoded.num_invalid,
            seconds=decoded.seconds,
        )

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
        beam = first_places(sid_rank, users, self._buckets.item_rank[targets.values])
        if not self._exclude_seen:
            return beam
        keys = users * self._buckets.num_items + targets.values
        return np.where(np.isin(keys, self._buckets.history_keys(histories)), -1, beam)
