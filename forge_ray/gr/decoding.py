"""Decode many histories: batch by length, search, return ranks of SIDs as arrays.

Knows a generator, a SID table and histories of item indices. Knows nothing about targets, metrics,
files or Ray; evaluation and recommendation both stand on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from forge_ray.data.ragged import Ragged
from forge_ray.evaluate.ranking import distinct_items
from forge_ray.gr.beam import Beams, StepwiseGenerator, beam_search
from forge_ray.gr.exact import ParallelGenerator, exact_search
from forge_ray.gr.prefix_index import PrefixIndex
from forge_ray.gr.scripts import TaskText, script_tokens
from forge_ray.gr.tasks import HISTORIES, QUERY_TASK, SEARCH_TASK, Prompts, history_beside
from forge_ray.gr.vocab import PAD, vocab_of
from forge_ray.sid.table import SidTable

MOST_ROOM = 4096
"""SIDs by which a search grows at most for the sake of seen items."""

HARDLY_BRANCHES = 1.25
"""Mean SIDs per prefix of the last level but one, up to which a search is expected to find no more
SIDs than it carries beams."""


@dataclass(frozen=True, slots=True)
class DecodedUsers:
    """Ranked SIDs of U users, in the order of their histories.

    Attributes:
        sid_rank: int32 [U, W], rank among the sorted distinct SIDs; -1 is a dead slot or an invalid
            SID.
        scores: float32 [U, W], log-probabilities, -inf in dead slots.
        num_emitted: live beams of all users, of each user's last search.
        num_invalid: those among them whose codes, looked up afresh in the table, belong to no item.
        seconds: wall time of tokenizing and search.
    """

    sid_rank: NDArray[np.int32]
    scores: NDArray[np.float32]
    num_emitted: int
    num_invalid: int
    seconds: float


class AskedGenerator(Protocol):
    """A generator that reads text."""

    def ask(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Read questions [B, Q], padded on the left; logits of level 0 and the state."""

    def step(self, state: Any, parents: Tensor, codes: Tensor, level: int) -> tuple[Tensor, Any]:
        """See `StepwiseGenerator.step`."""


@dataclass(frozen=True, slots=True)
class _Answering:
    """A generator whose search begins with a question in place of a history."""

    generator: AskedGenerator

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """See `StepwiseGenerator.prefill`."""
        return self.generator.ask(tokens, mask)

    def step(self, state: Any, parents: Tensor, codes: Tensor, level: int) -> tuple[Tensor, Any]:
        """See `StepwiseGenerator.step`."""
        return self.generator.step(state, parents, codes, level)


class SidDecoder:
    """A generator bound to the SIDs that it may emit.

    The prefix index is built once and kept; decoding any number of users reuses it.
    """

    index: PrefixIndex
    widths: tuple[int, ...]

    def __init__(
        self,
        generator: StepwiseGenerator,
        table: SidTable,
        *,
        widths: Sequence[int],
        max_history: int,
        batch_users: int = 32,
        fills: int = 0,
        constrained: bool = True,
        allowed: NDArray[np.bool_] | None = None,
        text: TaskText | None = None,
        prompts: Prompts = HISTORIES,
        device: torch.device | str = "cpu",
    ) -> None:
        """Index the table, or the allowed part of it.

        Args:
            generator: on ``device``; put into evaluation mode while decoding.
            table: SIDs of all items; also the codes that histories are written in.
            widths: beams to keep after each level; a generator that predicts all levels at once
                ranks every SID, and only the last width counts.
            max_history: newest items of a history that the generator reads.
            batch_users: users per search.
            fills: length that lists must have when seen items are taken out later, which is also
                the W of the rankings then: SIDs whose items a user has all seen are left out. 0
                leaves rankings and widths as they are. Widens the last level where a history is
                longer than half its width, by the surplus and at most `MOST_ROOM`; users for whom
                that leaves too few SIDs are searched again, as wide at every level as they need
                and as many at a time (one at least) as take no more memory. Where the last level
                hardly branches (`HARDLY_BRANCHES`), users who need more SIDs than beams are
                carried are searched so at once.
            constrained: False decodes without the index, to measure invalid SIDs.
            allowed: bool [N], items whose SIDs may be emitted; None allows all. Beams never enter
                a prefix without an allowed item, so lists stay as long as they can be.
            text: turns queries into questions, of a model that learned to be asked.
            prompts: what the model learned to be asked with; queries stand beside histories or
                alone, as in its training.
            device: where the search runs.
        """
        indexed = table.codes if allowed is None else table.codes[allowed]
        self.index = PrefixIndex.build(indexed, table.codebook_sizes, device=device)
        self._allowed = allowed
        self.widths = tuple(widths)
        self._generator = generator
        self._codes = table.codes
        self._vocab = vocab_of(table.codebook_sizes)
        self._max_history = max_history
        self._batch_users = batch_users
        self._fills = fills
        self._constrained = constrained
        self._is_exact = constrained and isinstance(generator, ParallelGenerator)
        self._text = text
        self._prompts = prompts
        self._history_beside = history_beside(
            SEARCH_TASK if prompts.beside else QUERY_TASK, max_history
        )
        self._device = device

    def item_rank(self) -> NDArray[np.int64]:
        """SID of every item as a rank among the indexed SIDs, int64 [N]; -1 is not allowed."""
        return self._item_rank

    @cached_property
    def _item_rank(self) -> NDArray[np.int64]:
        codes = torch.from_numpy(self._codes.astype(np.int64)).to(self._device)
        rank = self.index.find(codes).cpu().numpy()
        # A denied item may share its SID with an allowed one.
        return rank if self._allowed is None else np.where(self._allowed, rank, -1)

    @cached_property
    def _sizes(self) -> NDArray[np.int32]:
        """Items of each SID [S]."""
        ranks = self._item_rank[self._item_rank >= 0]
        return np.bincount(ranks, minlength=self.index.num_sids).astype(np.int32)

    def decode(self, histories: Ragged, queries: Sequence[str] | None = None) -> DecodedUsers:
        """Search the SIDs of every history.

        Users are batched by history length, so that little of a batch is padding; results do not
        depend on it beyond rounding.

        Args:
            histories: U rows of item indices, oldest first; empty rows are allowed.
            queries: U texts, what each user asks for; None asks for the next item.

        Raises:
            ConfigError: the model did not learn to be asked so.
        """
        self._prompts.check(has_queries=queries is not None)
        started = perf_counter()
        shape = (len(histories), self._fills or self.widths[-1])
        ranks = np.full(shape, -1, np.int32)
        scores = np.full(shape, -np.inf, np.float32)
        emitted, invalid = np.zeros((2, len(histories)), np.int64)

        def search(rows: NDArray[np.int64], least: int = 1) -> None:
            some = histories.take(rows)
            asked = None if queries is None else [queries[row] for row in rows.tolist()]
            beams = self._search(some, asked, self._widths(some, least))
            emitted[rows] = beams.is_live.sum(dim=1).cpu().numpy()
            wrong = beams.is_live & (self.index.find(beams.codes) < 0)
            invalid[rows] = wrong.sum(dim=1).cpu().numpy()
            ranks[rows], scores[rows] = self._ranking(beams, some)

        with evaluation_mode(self._generator):
            for rows in self._batches(histories):
                search(rows)
            for rows, wanted in self._short(histories, emitted - invalid):
                search(rows, wanted)
        seconds = perf_counter() - started
        return DecodedUsers(ranks, scores, int(emitted.sum()), int(invalid.sum()), seconds)

    def _batches(self, histories: Ragged) -> Iterator[NDArray[np.int64]]:
        lengths = np.minimum(histories.lengths, self._max_history)
        order = np.argsort(-lengths, kind="stable")
        if self._widens_at_once:
            order = order[self._wanted(histories)[order] <= self.widths[-2]]
        for start in range(0, len(order), self._batch_users):
            yield order[start : start + self._batch_users]

    def _short(
        self, histories: Ragged, num_found: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Batches of users with too few SIDs for a full list, and the beams that they need.

        Users who were not searched yet have none.
        """
        if not self._fills:
            return
        wanted = self._wanted(histories)
        short = np.flatnonzero(num_found < wanted)
        order = short[np.argsort(-wanted[short], kind="stable")]
        start = 0
        while start < len(order):
            # A group shares the beams of its neediest, however many of it are searched at a time.
            most = int(wanted[order[start]])
            usual = self.widths[0]
            group = order[start : start + max(1, self._batch_users * usual // max(most, usual))]
            # Which beam sees which is a square: twice the beams, a quarter of the users.
            at_a_time = max(1, self._batch_users * usual**2 // max(most, usual) ** 2)
            for rows in np.array_split(group, -(-len(group) // at_a_time)):
                yield rows, most
            start += len(group)

    def _wanted(self, histories: Ragged) -> NDArray[np.int64]:
        """SIDs that fill each user's list whatever items of the history they stand for [U]."""
        room = np.minimum(histories.lengths, MOST_ROOM)
        return np.minimum(self._fills + room, self.index.num_sids)

    @cached_property
    def _widens_at_once(self) -> bool:
        """Whether a search with the usual beams would find too few SIDs for most histories."""
        if not self._fills or self._is_exact or self.index.num_levels < 2:
            return False
        num_prefixes = self.index.levels[-2].num_prefixes
        return self.index.num_sids <= HARDLY_BRANCHES * num_prefixes

    def _widths(self, histories: Ragged, least: int) -> tuple[int, ...]:
        """Beams that a batch keeps after each level, at least as many as given."""
        widths = tuple(max(one, least) for one in self.widths)
        if not self._fills:
            return widths
        surplus = int(histories.lengths.max(initial=0)) - self.widths[-1] // 2
        room = min(max(surplus, 0), MOST_ROOM)
        return (*widths[:-1], max(self.widths[-1] + room, least))

    def _ranking(
        self, beams: Beams, histories: Ragged
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ranks and scores of a batch, of one width whatever room its users needed."""
        ranks = beams.sid_rank.cpu().numpy().astype(np.int32)
        scores = beams.scores.cpu().numpy()
        if not self._fills:
            return ranks, scores
        seen = distinct_items(histories, len(self._codes)).map(self._item_rank)
        return without_seen(ranks, scores, seen, self._sizes, width=self._fills)

    def _search(
        self, histories: Ragged, queries: list[str] | None, widths: tuple[int, ...]
    ) -> Beams:
        if queries is not None:
            tokens, mask = self._questions(histories, queries)
            generator = _Answering(cast(AskedGenerator, self._generator))
            return beam_search(
                generator, tokens, mask, self.index, widths, constrained=self._constrained
            )
        tokens, mask = self._vocab.history_tokens(histories, self._codes, self._max_history)
        tokens, mask = tokens.to(self._device), mask.to(self._device)
        if self._is_exact:
            exact = cast(ParallelGenerator, self._generator)
            return exact_search(exact, tokens, mask, self.index, widths[-1])
        return beam_search(
            self._generator, tokens, mask, self.index, widths, constrained=self._constrained
        )

    def _questions(self, histories: Ragged, queries: list[str]) -> tuple[Tensor, Tensor]:
        """Questions as token rows padded on the left, and a mask that is False on padding."""
        assert self._text is not None  # published with every model that learned queries
        scripts = self._text.questions(histories.tail(self._history_beside), queries)
        rows = script_tokens(scripts, self._codes, self._vocab)
        tokens = torch.from_numpy(rows.padded(side="left", fill=PAD))
        column = torch.arange(tokens.shape[1])
        mask = column >= tokens.shape[1] - torch.from_numpy(rows.lengths).unsqueeze(1)
        return tokens.to(self._device), mask.to(self._device)


def without_seen(
    sid_rank: NDArray[np.integer[Any]],
    scores: NDArray[np.float32],
    seen: Ragged,
    sizes: NDArray[np.integer[Any]],
    *,
    width: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Rankings of one width without the SIDs that hold nothing new; each left has an unseen item.

    Args:
        sid_rank: integer [B, R], best first, -1 for dead beams.
        scores: float32 [B, R].
        seen: B rows, the SID of each distinct seen item; -1 where that must not be shown.
        sizes: integer [S], items of each SID.
        width: SIDs to keep, W.

    Returns:
        int32 [B, W] and float32 [B, W], with -1 and -inf behind the last of a short ranking.
    """
    num_sids = len(sizes)
    own = (seen.row_ids * num_sids + seen.values)[seen.values >= 0]
    keys, counts = np.unique(own, return_counts=True)
    rows = np.arange(len(sid_rank), dtype=np.int64)[:, None]
    is_gone = np.isin(rows * num_sids + sid_rank, keys[counts == sizes[keys % num_sids]])
    is_kept = (sid_rank >= 0) & ~is_gone
    row, column = np.nonzero(is_kept)
    place = (np.cumsum(is_kept, axis=1) - 1)[row, column]
    fits = place < width
    row, column, place = row[fits], column[fits], place[fits]
    ranks = np.full((len(sid_rank), width), -1, np.int32)
    values = np.full((len(sid_rank), width), -np.inf, np.float32)
    ranks[row, place] = sid_rank[row, column]
    values[row, place] = scores[row, column]
    return ranks, values


@contextmanager
def evaluation_mode(generator: StepwiseGenerator) -> Iterator[None]:
    """Switch dropout off for the block; restores the mode that was on."""
    if not isinstance(generator, nn.Module):
        yield
        return
    was_training = generator.training
    generator.eval()
    try:
        yield
    finally:
        generator.train(was_training)
