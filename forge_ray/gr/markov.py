"""`markov_backoff`: the prefix-backoff probe as a recommender over a SID table.

A baseline that knows the SIDs and the train transitions between their prefixes and fits one weight
for each length of a prefix, 0 to L. It scores every distinct SID of the catalogue, exactly, and
hands over a ranking of SIDs like a beam search does, so that it is judged like one.

With p_l(s) the length-l prefix of SID s, h the weights of the newest history items and q the
popularity prior of one item of s:

    score(s) = q(s) · ( λ_0 + Σ_l λ_l · (h E_l A_l)[p_l(s)] / mass_l[p_l(s)] )

Source: ours (see `docs/metrics.md`); the weights λ are fitted by EM on validation targets.

Shapes: U users, S distinct SIDs, P_l prefixes of length l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset, SequenceBatch
from forge_ray.errors import ConfigError
from forge_ray.gr.decoding import MOST_ROOM, DecodedUsers
from forge_ray.sid.metrics.backoff import (
    PrefixModel,
    count_transitions,
    fit_mixture,
    fit_model,
    merge_transitions,
    probe_rows,
)
from forge_ray.sid.table import SidTable

_BLOCK_CELLS = 1 << 22
"""(user, SID) scores held at a time: about 60 MB with what they are made from."""

_LEAST_PRIOR = 1e-6
"""Least weight λ_0 of popularity."""


@dataclass(frozen=True, kw_only=True)
class MarkovConfig:
    """What the recommender counts and how far it looks back; the defaults are the probe's."""

    window: int = 3
    """Largest distance of two items that counts as a transition."""
    decay: float = 0.6
    """Weight of one more step of distance or age."""
    history: int = 5
    """Newest history items that are read."""
    em_steps: int = 60
    """Steps that fit the weights of the depths."""
    fit_users: int = 20_000
    """Validation users whose targets fit them, a fixed random sample."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("window", "history", "em_steps", "fit_users"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"markov_backoff.{name} must be >= 1, got {getattr(self, name)}. Raise it."
                )
        if not 0 < self.decay <= 1:
            raise ConfigError(
                f"markov_backoff.decay must be in (0, 1], got {self.decay}. Use e.g. 0.6."
            )


@dataclass(frozen=True)
class MarkovBackoff:
    """See the module docstring; a search over SIDs (`gr.evaluation.SidSearch`)."""

    model: PrefixModel
    mixture: npt.NDArray[np.float64]
    """λ_0..λ_L."""
    config: MarkovConfig
    top_k: int
    """Items that the rankings must hold; seen ones come on top."""

    @property
    def widths(self) -> tuple[int, ...]:
        """All prefixes are kept; at the end at least this many SIDs."""
        return (self.top_k,)

    def item_rank(self) -> npt.NDArray[np.int64]:
        """SID of every item as a rank among the sorted distinct SIDs, int64 [N]."""
        return self.model.prefixes.ids[-1]

    def decode(self, histories: Ragged, queries: Sequence[str] | None = None) -> DecodedUsers:
        """Rank the best SIDs of every history.

        Args:
            histories: U rows of item indices, oldest first.
            queries: not read.
        """
        started = perf_counter()
        num_sids = self.model.prefixes.counts[-1]
        # Seen items are taken out later and must not shorten the lists.
        room = min(int(histories.lengths.max(initial=0)), MOST_ROOM)
        width = min(self.top_k + room, num_sids)
        ranks = np.empty((len(histories), width), dtype=np.int32)
        scores = np.empty((len(histories), width), dtype=np.float32)
        step = max(1, _BLOCK_CELLS // num_sids)
        for start in range(0, len(histories), step):
            rows = slice(start, start + step)
            block = histories.take(np.arange(start, min(start + step, len(histories))))
            ranks[rows], scores[rows] = _best(self._scores(block), width)
        seconds = perf_counter() - started
        return DecodedUsers(ranks, np.log(scores), ranks.size, 0, seconds)

    def _scores(self, histories: Ragged) -> npt.NDArray[np.float32]:
        """Probability of one item of each SID [U, S]."""
        recent = histories.tail(self.config.history)
        age = np.repeat(recent.lengths, recent.lengths) - 1 - recent.positions
        weight = self.config.decay**age
        total = np.bincount(recent.row_ids, weight, minlength=len(recent))
        weight = weight / total[recent.row_ids]
        found = np.full((len(histories), len(self._tables[0])), self.mixture[0], dtype=np.float32)
        for ids, matrix, scale, prefix_of_sid in zip(
            self.model.prefixes.ids,
            self.model.transitions,
            self._scales,
            self._tables,
            strict=True,
        ):
            at = (recent.row_ids, ids[recent.values])
            mass = sp.csr_array((weight, at), shape=(len(histories), matrix.shape[0])) @ matrix
            dense = mass.toarray().astype(np.float32) * scale
            found += dense[:, prefix_of_sid]
        return np.asarray(found * self._prior)

    @cached_property
    def _item_of_sid(self) -> npt.NDArray[np.int64]:
        """One item of each SID [S], any of those that share it."""
        rank = self.item_rank()
        item = np.empty(int(rank.max()) + 1, dtype=np.int64)
        item[rank] = np.arange(len(rank))
        return item

    @cached_property
    def _prior(self) -> npt.NDArray[np.float32]:
        return self.model.item_prior[self._item_of_sid].astype(np.float32)

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.int64], ...]:
        """For each depth the prefix of each SID [S]."""
        return tuple(ids[self._item_of_sid] for ids in self.model.prefixes.ids)

    @cached_property
    def _scales(self) -> tuple[npt.NDArray[np.float32], ...]:
        """For each depth λ over the popularity of each prefix [P_l]."""
        masses = (np.bincount(ids, self.model.item_prior) for ids in self.model.prefixes.ids)
        pairs = zip(self.mixture[1:], masses, strict=True)
        return tuple((weight / mass).astype(np.float32) for weight, mass in pairs)


def _best(
    scores: npt.NDArray[np.float32], width: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Columns of the largest scores of each row, best first, equal ones by column."""
    if width < scores.shape[1]:
        kept = np.sort(np.argpartition(-scores, width - 1, axis=1)[:, :width], axis=1)
    else:
        kept = np.broadcast_to(np.arange(width), scores.shape)
    values = np.take_along_axis(scores, kept, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(kept, order, axis=1), np.take_along_axis(values, order, axis=1)


def fit_markov(
    dataset: Dataset, table: SidTable, config: MarkovConfig, *, top_k: int
) -> MarkovBackoff:
    """Count transitions on the train part and fit the weights on validation targets.

    Memory: 24 bytes for each distinct transition of items, to which blocks of users are added as
    they are read, and 12 bytes for each distinct transition of prefixes, depth by depth.

    Args:
        dataset: the dataset of the table.
        table: SIDs of all items.
        config: what is counted.
        top_k: items that rankings must hold.
    """
    parts = (
        count_transitions(batch.items, dataset.num_items, window=config.window, decay=config.decay)
        for batch in dataset.sequence_batches("train")
    )
    transitions = merge_transitions(parts, dataset.num_items)
    model = fit_model(table.codes, transitions, dataset.train_counts())
    batches = list(dataset.sequence_batches("validation", limit=config.fit_users))
    rows = [_rows(batch, config) for batch in batches]
    factors = np.concatenate([model.factors(one) for one in rows])
    share = np.concatenate([one.row_weight for one in rows])
    mixture = fit_mixture(factors, share, steps=config.em_steps)
    # SIDs that no transition reaches follow in order of popularity.
    mixture[0] = max(mixture[0], _LEAST_PRIOR)
    return MarkovBackoff(model, mixture, config, top_k)


def _rows(batch: SequenceBatch, config: MarkovConfig) -> Any:
    assert batch.targets is not None  # held-out splits always have targets
    return probe_rows(batch.items, batch.targets, length=config.history, decay=config.decay)
