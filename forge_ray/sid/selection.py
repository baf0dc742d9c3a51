"""How good a quantizer is while it trains: proxies on validation users, for choosing what is kept.

Reads the train part and validation users, never test. Bounded: the items that the sampled users
touch, filled up by a random sample of the others, are coded for each measurement; for a catalogue
within `selection.max_items` that is all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset, SequenceBatch
from forge_ray.embed.vectors import VectorSet
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.backoff import (
    ProbeData,
    Transitions,
    backoff_bits,
    count_transitions,
    merge_transitions,
    probe_rows,
)
from forge_ray.sid.metrics.hitrate import embedding_hitrate
from forge_ray.sid.metrics.quality import symbol_quality
from forge_ray.sid.quantizers.base import FloatArray, Int64Array, Quantizer
from forge_ray.sid.quantizers.rq_vae_config import SelectionConfig

_TRAIN_USERS_PER_HELD_OUT = 10


@dataclass(frozen=True, eq=False)
class _Sample:
    """What every measurement of a run reads; items are numbered anew, 0..M-1."""

    vectors: FloatArray
    """float32 [M, D]."""
    probe: ProbeData
    histories: Ragged
    """Validation histories, one row per target."""
    targets: Int64Array
    row_weight: npt.NDArray[np.float64]


class ProxySelector:
    """Measures quantizers on one dataset; reads it at the first call. Picklable before that."""

    def __init__(
        self, config: SelectionConfig, dataset: Dataset, source: VectorSet, *, seed: int
    ) -> None:
        """Name what is measured.

        Args:
            config: metric and bounds.
            dataset: train and validation users.
            source: the vectors that the quantizer is fitted on.
            seed: of the sample of items and the halves of the validation users.
        """
        self.config = config
        self.dataset = dataset
        self.source = source
        self.seed = seed
        self._sample: _Sample | None = None

    def __call__(self, quantizer: Quantizer) -> dict[str, float]:
        """Code the sampled items and measure them.

        Returns:
            The chosen metric, and uniqueness and Gini beside it.
        """
        if self._sample is None:
            self._sample = self._load()
        sample = self._sample
        codes = quantizer.encode(sample.vectors)
        quality = symbol_quality(codes, quantizer.codebook_sizes)
        metrics = {"uniqueness": quality.uniqueness, "gini": quality.gini}
        if self.config.metric == "backoff_bits":
            metrics["backoff_bits"] = backoff_bits(codes, sample.probe).bits
        if self.config.metric == "embedding_hitrate":
            report = embedding_hitrate(
                quantizer.decode(codes),
                sample.histories,
                sample.targets,
                row_weight=sample.row_weight,
            )
            metrics["embedding_hitrate"] = report.hitrate
        return metrics

    def _load(self) -> _Sample:
        users = self._held_out()
        assert users.targets is not None
        rng = np.random.default_rng(self.seed)
        items = self._items(users, rng)
        number = np.full(self.dataset.num_items, len(items), dtype=np.int64)
        number[items] = np.arange(len(items))
        histories, targets = _renumbered(users.items, number), _renumbered(users.targets, number)
        rows = probe_rows(histories, targets)
        is_fit = rng.permutation(len(users)) < (len(users) + 1) // 2
        probe = ProbeData(
            transitions=self._transitions(number, len(items)),
            train_counts=self.dataset.train_counts()[items],
            fit=rows.take(is_fit[targets.row_ids]),
            score=rows.take(~is_fit[targets.row_ids]),
        )
        return _Sample(
            vectors=self.source.take(items),
            probe=probe,
            histories=histories.take(targets.row_ids),
            targets=targets.values.astype(np.int64),
            row_weight=rows.row_weight,
        )

    def _held_out(self) -> SequenceBatch:
        """Validation users, as many as touch no more items than are coded."""
        limit = self.config.max_users
        parts = list(self.dataset.sequence_batches("validation", limit=limit))
        if sum(len(part) for part in parts) < 2:
            raise ConfigError(
                "quantizer.selection.checks must be 0 for a dataset without validation users, got "
                f"{self.config.checks}. Set it, or prepare the dataset with a split that holds "
                "users out."
            )
        users = SequenceBatch(
            np.concatenate([part.user_index for part in parts]),
            Ragged.concatenate([part.items for part in parts]),
            Ragged.concatenate([part.targets for part in parts if part.targets is not None]),
        )
        while len(_touched(users)) > self.config.max_items and len(users) > 2:
            users = _first(users, len(users) // 2)
        return users

    def _items(self, users: SequenceBatch, rng: np.random.Generator) -> Int64Array:
        """The users' items and a random sample of the others, sorted."""
        is_chosen = np.zeros(self.dataset.num_items, dtype=bool)
        is_chosen[_touched(users)] = True
        others = np.flatnonzero(~is_chosen)
        room = min(len(others), max(0, self.config.max_items - int(is_chosen.sum())))
        is_chosen[rng.choice(others, size=room, replace=False)] = True
        return np.flatnonzero(is_chosen)

    def _transitions(self, number: Int64Array, num_items: int) -> Transitions:
        """Train transitions among the sampled items; all others share a number, left out after."""
        limit = _TRAIN_USERS_PER_HELD_OUT * self.config.max_users
        parts = [
            count_transitions(_renumbered(batch.items, number), num_items + 1)
            for batch in self.dataset.sequence_batches("train", limit=limit)
        ]
        whole = merge_transitions(parts, num_items + 1)
        is_inside = (whole.source < num_items) & (whole.target < num_items)
        return Transitions(
            whole.source[is_inside], whole.target[is_inside], whole.weight[is_inside]
        )


def _touched(users: SequenceBatch) -> npt.NDArray[np.integer]:
    assert users.targets is not None
    return np.union1d(users.items.values, users.targets.values)


def _first(users: SequenceBatch, count: int) -> SequenceBatch:
    assert users.targets is not None
    kept = np.arange(count)
    return SequenceBatch(users.user_index[kept], users.items.take(kept), users.targets.take(kept))


def _renumbered(items: Ragged, number: Int64Array) -> Ragged:
    return Ragged.from_lengths(number[items.values], items.lengths)
