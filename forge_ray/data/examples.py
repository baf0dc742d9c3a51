"""How sequences become training rows, and which of them a global batch holds.

Rows are named by number and cut out of the sequences when a batch asks for them. Where every item
ends a row of its own, the rows of a shard together are tens of times its size; what is held here is
the sequences, one integer per sequence and one per row.

Knows lists of integers and random draws. Knows nothing about files, ranks or what integers mean.

Shapes: S sequences, R rows, Q rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged

ExampleMode = Literal["window", "prefix", "last", "whole"]
"""`window`: rows are pieces of sequences, every item is a target; `prefix`: rows are histories that
end in their target, one for every item; `last`: likewise, one for each sequence, ending in its last
item; `whole`: sequences are rows as they are."""


@dataclass(frozen=True)
class BatchPlan:
    """What decides the content and order of global batches, besides the files.

    Attributes:
        batch_rows: rows of a global batch.
        max_items: longest row; longer sequences are cut.
        mode: how sequences become rows.
        window_batches: global batches among which rows are sorted by length, at least 1.
        seed: of every permutation.
    """

    batch_rows: int
    max_items: int
    mode: ExampleMode
    window_batches: int
    seed: int


class Rows(Protocol):
    """Training rows that are not cut out yet."""

    def __len__(self) -> int: ...

    def lengths(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Sizes [Q] of rows with these numbers [Q]."""

    def take(self, rows: NDArray[np.integer[Any]]) -> Ragged:
        """Rows with these numbers [Q], in this order."""


@dataclass(frozen=True)
class Pieces:
    """Rows that are few: one contiguous piece of the sequences each.

    Attributes:
        sequences: S rows.
        starts: int64 [R], first flat position of each piece.
        sizes: int64 [R], items of each piece.
    """

    sequences: Ragged
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def lengths(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """See `Rows.lengths`."""
        return self.sizes[rows]

    def take(self, rows: NDArray[np.integer[Any]]) -> Ragged:
        """See `Rows.take`."""
        return self.sequences.slices(self.starts[rows], self.sizes[rows])


@dataclass(frozen=True)
class Prefixes:
    """A row for every item but the first of each sequence: that item last, its history before it.

    Attributes:
        sequences: S rows.
        max_items: longest row; the oldest items of longer ones are left out.
        first_rows: int64 [S + 1], number of the first row of each sequence, and R.
    """

    sequences: Ragged
    max_items: int
    first_rows: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Ragged, max_items: int) -> Prefixes:
        """All prefixes of at least two items."""
        counts = np.maximum(sequences.lengths - 1, 0)
        return cls(sequences, max_items, np.concatenate([[0], np.cumsum(counts)]))

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def lengths(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """See `Rows.lengths`."""
        return self._ends(rows)[1]

    def take(self, rows: NDArray[np.integer[Any]]) -> Ragged:
        """See `Rows.take`."""
        ends, lengths = self._ends(rows)
        return self.sequences.slices(ends - lengths, lengths)

    def _ends(self, rows: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Flat positions behind the rows, and their lengths."""
        owner = np.searchsorted(self.first_rows, rows, side="right") - 1
        history = rows - self.first_rows[owner] + 1
        ends = self.sequences.offsets[owner] + history + 1
        return ends, np.minimum(history + 1, self.max_items)


def whole(sequences: Ragged) -> Pieces:
    """The sequences as they are."""
    return Pieces(sequences, sequences.offsets[:-1], sequences.lengths)


def last_items(sequences: Ragged, max_items: int) -> Pieces:
    """A row for each sequence of two items or more: its newest `max_items`, the target last."""
    owner = np.flatnonzero(sequences.lengths > 1)
    sizes = np.minimum(sequences.lengths[owner], max_items)
    return Pieces(sequences, sequences.offsets[owner + 1] - sizes, sizes)


def windows(sequences: Ragged, max_items: int, rng: np.random.Generator) -> Pieces:
    """Cuts sequences into consecutive pieces of at most `max_items`; every item is in one piece.

    The borders of long sequences are drawn anew each time, so that over epochs every item is seen
    after contexts of different lengths.
    """
    lengths = sequences.lengths
    shift = np.where(lengths > max_items, rng.integers(0, max_items, size=len(lengths)), 0)
    pieces = -(-(lengths + shift) // max_items)
    owner = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = np.maximum(number * max_items - shift[owner], 0)
    end = np.minimum((number + 1) * max_items - shift[owner], lengths[owner])
    return Pieces(sequences, sequences.offsets[owner] + start, end - start)


def batch_order(
    rows: Rows, *, batch_rows: int, window_batches: int, rng: np.random.Generator
) -> Iterator[NDArray[np.signedinteger[Any]]]:
    """Row numbers of each batch: permuted rows, sorted by length inside windows, batches permuted.

    Every row is in exactly one batch; only the last window has a batch below `batch_rows`.

    Args:
        rows: to be spread.
        batch_rows: rows of a batch.
        window_batches: batches of a window.
        rng: source of both permutations.
    """
    # Half of what `rng.permutation(len(rows))` takes, and the same order.
    order = np.arange(len(rows), dtype=np.int32 if len(rows) < 2**31 else np.int64)
    rng.shuffle(order)
    for start in range(0, len(order), batch_rows * window_batches):
        window = order[start : start + batch_rows * window_batches]
        window = window[np.argsort(rows.lengths(window), kind="stable")]
        batches = [window[at : at + batch_rows] for at in range(0, len(window), batch_rows)]
        yield from (batches[index] for index in rng.permutation(len(batches)))


def segment_rows(
    sequences: Ragged, plan: BatchPlan, *, epoch: int, segment: int
) -> tuple[Rows, Iterator[NDArray[np.signedinteger[Any]]]]:
    """Training rows of one segment, and which of them each global batch holds."""
    rng = np.random.default_rng([plan.seed, epoch, segment])
    rows: Rows
    if plan.mode == "window":
        rows = windows(sequences, plan.max_items, rng)
    elif plan.mode == "prefix":
        rows = Prefixes.of(sequences, plan.max_items)
    elif plan.mode == "last":
        rows = last_items(sequences, plan.max_items)
    else:
        rows = whole(sequences)
    batches = batch_order(
        rows, batch_rows=plan.batch_rows, window_batches=plan.window_batches, rng=rng
    )
    return rows, batches


def in_groups(
    rows: Rows, batches: Iterable[NDArray[np.signedinteger[Any]]], *, num_values: int
) -> Iterator[list[NDArray[np.signedinteger[Any]]]]:
    """Successive batches together, as many as have at most so many values, but at least one."""
    group: list[NDArray[np.signedinteger[Any]]] = []
    size = 0
    for batch in batches:
        more = int(rows.lengths(batch).sum())
        if group and size + more > num_values:
            yield group
            group, size = [], 0
        group.append(batch)
        size += more
    if group:
        yield group
