"""The prefix-backoff probe: how many bits the next item costs when only SID prefixes are known.

A Markov model over SID prefixes, from the empty prefix (popularity) to the full SID, mixed by
weights that EM fits on held-out targets. It sees whether neighbouring items in users' histories
have related codes, which no symbol statistic can: permuting the item-to-SID assignment leaves
those unchanged and costs this probe its whole gain.

Pure NumPy and SciPy; knows nothing about datasets, splits or files. The caller decides which
targets may be used to fit the weights and which to score.

Source: ours (see `docs/metrics.md`); it needs an order of prefixes, so it does not suit
product-quantized codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from forge_ray.data.ragged import Ragged
from forge_ray.sid.metrics.quality import PrefixIds, distinct_rows, prefix_ids

_FLOOR = 1e-30
"""Added to a probability before the logarithm: an impossible target costs 100 bits, not infinity.
"""


@dataclass(frozen=True)
class Transitions:
    """Weighted item-to-item transitions of the train part, each (source, target) once."""

    source: npt.NDArray[np.int64]
    """Item index [E]."""
    target: npt.NDArray[np.int64]
    """Item index [E]."""
    weight: npt.NDArray[np.float64]
    """Sum of `decay ** (distance − 1)` over the occurrences [E]."""


def count_transitions(
    sequences: Ragged, num_items: int, *, window: int = 3, decay: float = 0.6
) -> Transitions:
    """Count which item follows which within a short window.

    Memory: 16 bytes for each position and distance, then O(distinct transitions).

    Args:
        sequences: train items of each user in time order.
        num_items: size N of the catalogue.
        window: largest distance between the two items.
        decay: weight of one more step of distance.
    """
    rows = sequences.row_ids
    items = sequences.values.astype(np.int64)
    total = sp.csr_array((num_items, num_items), dtype=np.float64)
    for distance in range(1, window + 1):
        at = np.flatnonzero(rows[:-distance] == rows[distance:])
        weight = np.full(len(at), decay ** (distance - 1))
        pairs = (items[at], items[at + distance])
        total = total + sp.csr_array((weight, pairs), shape=(num_items, num_items))
    return _from_matrix(total)


def merge_transitions(parts: Iterable[Transitions], num_items: int) -> Transitions:
    """Add the transitions of several blocks of users (streaming, or a distributed group-by).

    Memory: 24 bytes for each distinct transition, and one part at a time where parts are generated.
    """
    total = sp.csr_array((num_items, num_items), dtype=np.float64)
    for part in parts:
        pairs = (part.source, part.target)
        total = total + sp.csr_array((part.weight, pairs), shape=(num_items, num_items))
    return _from_matrix(total)


def _from_matrix(matrix: Any) -> Transitions:
    triples = matrix.tocoo()
    return Transitions(
        triples.row.astype(np.int64), triples.col.astype(np.int64), triples.data.astype(np.float64)
    )


@dataclass(frozen=True)
class ProbeRows:
    """Held-out targets with the recent history before them; M targets, H history places."""

    items: npt.NDArray[np.int64]
    """Item index [M, H], newest first; padding is 0 with weight 0."""
    weights: npt.NDArray[np.float64]
    """`decay ** age`, scaled to sum 1 in each row [M, H]; all 0 for an empty history."""
    target: npt.NDArray[np.int64]
    """Item index [M]."""
    row_weight: npt.NDArray[np.float64]
    """Share of the user that the target stands for: 1 / targets of that user [M]."""

    def take(self, rows: npt.NDArray[Any]) -> ProbeRows:
        """Select targets by mask or index."""
        return ProbeRows(
            self.items[rows], self.weights[rows], self.target[rows], self.row_weight[rows]
        )


def probe_rows(
    histories: Ragged, targets: Ragged, *, length: int = 5, decay: float = 0.6
) -> ProbeRows:
    """Lay out held-out users for the probe.

    Args:
        histories: items before the target, in time order, one row per user.
        targets: held-out items, the same number of rows.
        length: newest history items to keep.
        decay: weight of one more step of age.
    """
    lengths = np.minimum(histories.lengths, length)
    recent = histories.padded(length, side="left", fill=0)[:, ::-1].astype(np.int64)
    weights = np.where(np.arange(length) < lengths[:, None], decay ** np.arange(length), 0.0)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    users = targets.row_ids
    return ProbeRows(
        items=recent[users],
        weights=weights[users],
        target=targets.values.astype(np.int64),
        row_weight=1.0 / np.repeat(targets.lengths, targets.lengths),
    )


@dataclass(frozen=True)
class PrefixModel:
    """Prefix statistics of one code table: everything `factors` needs. Immutable."""

    prefixes: PrefixIds
    item_prior: npt.NDArray[np.float64]
    """Popularity prior of each item, uniform inside its SID's bucket [N]; sums to 1."""
    transitions: tuple[Any, ...]
    """For each depth a row-stochastic sparse matrix [P_l, P_l] over prefixes, sorted indices."""

    def factors(self, rows: ProbeRows) -> npt.NDArray[np.float64]:
        """Probability of each target under the model of each depth.

        Args:
            rows: M targets with their histories.

        Returns:
            float64 [M, L + 1]: column 0 is the prior, column l the Markov model over prefixes of
            length l, with the prior inside a prefix.
        """
        prior = self.item_prior[rows.target]
        columns = [prior]
        for ids, matrix in zip(self.prefixes.ids, self.transitions, strict=True):
            mass = np.bincount(ids, weights=self.item_prior)
            target = ids[rows.target]
            follow = _lookup(matrix, ids[rows.items], target[:, None])
            columns.append((rows.weights * follow).sum(axis=1) * prior / mass[target])
        return np.stack(columns, axis=1)


def fit_model(
    codes: npt.NDArray[np.integer[Any]],
    transitions: Transitions,
    train_counts: npt.NDArray[np.integer[Any]],
    *,
    prefixes: PrefixIds | None = None,
) -> PrefixModel:
    """Group the transitions and the popularity by the prefixes of a code table.

    Args:
        codes: integer codes [N, L].
        transitions: item-to-item transitions of the train part.
        train_counts: train interactions of each item [N].
        prefixes: `prefix_ids(codes)` when the caller has them already.
    """
    prefixes = prefix_ids(codes) if prefixes is None else prefixes
    smoothed = train_counts + 0.5
    buckets = prefixes.ids[-1]
    mass = np.bincount(buckets, weights=smoothed / smoothed.sum())
    prior = (mass / np.bincount(buckets))[buckets]
    matrices = tuple(
        _prefix_matrix(ids, count, transitions)
        for ids, count in zip(prefixes.ids, prefixes.counts, strict=True)
    )
    return PrefixModel(prefixes, prior, matrices)


def _prefix_matrix(ids: npt.NDArray[np.int64], count: int, transitions: Transitions) -> Any:
    pairs = (ids[transitions.source], ids[transitions.target])
    matrix = sp.csr_array((transitions.weight, pairs), shape=(count, count))
    matrix.sum_duplicates()  # also sorts the column indices, which `_lookup` relies on
    totals: npt.NDArray[np.float64] = np.asarray(matrix.sum(axis=1)).ravel()
    per_row = np.diff(matrix.indptr)
    matrix.data = matrix.data / np.repeat(totals, per_row)
    return matrix


def _lookup(
    matrix: Any, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Entries of a CSR matrix with sorted indices at broadcast (rows, columns); 0 where absent."""
    width = np.int64(matrix.shape[1])
    if matrix.nnz == 0:
        return np.zeros(np.broadcast_shapes(rows.shape, columns.shape))
    numbers = np.arange(matrix.shape[0], dtype=np.int64)
    keys = np.repeat(numbers, np.diff(matrix.indptr)) * width + matrix.indices
    wanted = rows * width + columns
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, matrix.data[at], 0.0)


def fit_mixture(
    factors: npt.NDArray[np.float64], row_weight: npt.NDArray[np.float64], *, steps: int = 60
) -> npt.NDArray[np.float64]:
    """Fit the weights of the depths by EM on held-out targets, from a uniform start.

    Args:
        factors: probabilities [M, L + 1].
        row_weight: weight of each target [M].
        steps: EM steps.

    Returns:
        float64 [L + 1], non-negative, sum 1.
    """
    num_models = factors.shape[1]
    mixture = np.full(num_models, 1.0 / num_models)
    share = row_weight / row_weight.sum()
    for _ in range(steps):
        mixed = np.maximum(factors @ mixture, _FLOOR)
        mixture = mixture * (factors.T @ (share / mixed))
        mixture /= mixture.sum()
    return mixture


@dataclass(frozen=True)
class BackoffBits:
    """Result of the probe on one table."""

    bits: float
    """Mean −log2 P(target | history) over users, lower is better."""
    standard_error: float
    """Of `bits`, over targets."""
    tail: float
    """Bits over targets with few train interactions; NaN when there are none."""
    head: float
    """Bits over the other targets; NaN when there are none."""
    mixture: tuple[float, ...]
    """Weights of the depths 0..L; says how much each depth carries."""
    per_target: npt.NDArray[np.float64]
    """Bits of each target [M], for paired comparisons of tables."""


@dataclass(frozen=True)
class ProbeData:
    """What the probe compares tables on; the same for every table of a dataset."""

    transitions: Transitions
    train_counts: npt.NDArray[np.int64]
    """Train interactions of each item [N]."""
    fit: ProbeRows
    """Targets that fit the mixture."""
    score: ProbeRows
    """Targets that are scored; disjoint users from `fit` when used as a proxy."""


def backoff_bits(
    codes: npt.NDArray[np.integer[Any]],
    data: ProbeData,
    *,
    em_steps: int = 60,
    tail_max_count: int = 5,
    prefixes: PrefixIds | None = None,
) -> BackoffBits:
    """Run the probe on one code table. Sparse products only, memory O(transitions · levels).

    Args:
        codes: integer codes [N, L].
        data: transitions, popularity and held-out targets.
        em_steps: EM steps for the mixture.
        tail_max_count: a target with at most this many train interactions belongs to the tail.
        prefixes: `prefix_ids(codes)` when the caller has them already.
    """
    model = fit_model(codes, data.transitions, data.train_counts, prefixes=prefixes)
    mixture = fit_mixture(model.factors(data.fit), data.fit.row_weight, steps=em_steps)
    bits = -np.log2(model.factors(data.score) @ mixture + _FLOOR)
    weight = data.score.row_weight
    is_tail = data.train_counts[data.score.target] <= tail_max_count
    mean = _weighted_mean(bits, weight)
    squares = (weight * (bits - mean)) ** 2
    return BackoffBits(
        bits=mean,
        standard_error=float(np.sqrt(squares.sum()) / weight.sum()) if len(bits) else float("nan"),
        tail=_weighted_mean(bits[is_tail], weight[is_tail]),
        head=_weighted_mean(bits[~is_tail], weight[~is_tail]),
        mixture=tuple(float(value) for value in mixture),
        per_target=bits,
    )


def shuffled_codes(
    codes: npt.NDArray[np.integer[Any]], *, seed: int = 0
) -> npt.NDArray[np.integer[Any]]:
    """Permute the rows of a code table: the same symbols, given to the wrong items.

    The control of every behavioural metric: bucket sizes, usage and prefix counts stay as they
    are, all meaning is gone. Colliding tables cost more under it than unique ones, because a
    bucket of unrelated items shares its popularity evenly.

    Args:
        codes: integer codes [N, L].
        seed: fixes the permutation.
    """
    return codes[np.random.default_rng(seed).permutation(len(codes))]


def random_codes(
    codes: npt.NDArray[np.integer[Any]], codebook_sizes: Sequence[int], *, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Draw a random table of the same shape and the same bucket sizes as a given one.

    The reference for `shuffled_codes`: besides the assignment, the SIDs themselves are uniform
    over the code space, so per-level usage is even.

    Args:
        codes: integer codes [N, L], only their bucket structure is used.
        codebook_sizes: codes per level, length L.
        seed: fixes the draw.
    """
    rng = np.random.default_rng(seed)
    buckets = prefix_ids(codes)
    num_sids = buckets.counts[-1]
    shape = (2 * num_sids, len(codebook_sizes))
    drawn = distinct_rows(rng.integers(0, codebook_sizes, size=shape))
    if len(drawn) < num_sids:
        # The space is nearly full: the table's own SIDs are as random as any, once permuted.
        drawn = distinct_rows(codes).astype(np.int64)
    sids = rng.permutation(drawn)[:num_sids]
    return rng.permutation(sids[buckets.ids[-1]])


def _weighted_mean(values: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]) -> float:
    return float((values * weight).sum() / weight.sum()) if len(values) else float("nan")
