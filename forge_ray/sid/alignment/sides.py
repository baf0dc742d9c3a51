"""The tensors of one batch as its terms compare them, each computed and gathered once.

Knows names and sides; nothing about losses. B rows of this worker, C = world·B columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from forge_ray.sid.alignment.batch import AlignmentBatch


@dataclass(frozen=True)
class End:
    """One end of a search."""

    side: int
    """0 for anchors, 1 for positives of the batch."""
    name: str
    unit: bool
    """Rows are scaled to unit length."""


class Sides:
    """The tensors of a batch by name, for anchors (0) and positives (1)."""

    batch: AlignmentBatch
    tensors: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]
    items: tuple[torch.Tensor, torch.Tensor]
    """int64 [B] each."""
    users: tuple[torch.Tensor, torch.Tensor] | None
    """int64 [B] each; None without users."""

    def __init__(
        self,
        batch: AlignmentBatch,
        tensors: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    ) -> None:
        self.batch = batch
        self.tensors = tensors
        self.items = (batch.anchor.items, batch.positive.items)
        self.users = None
        if batch.user is not None and batch.user_positive is not None:
            self.users = (batch.user.users, batch.user_positive.users)
        self._rows: dict[End, torch.Tensor] = {}
        self._columns: dict[End, torch.Tensor] = {}
        self._products: dict[tuple[End, End], torch.Tensor] = {}
        self._sharing: torch.Tensor | None = None

    def rows(self, end: End) -> torch.Tensor:
        """This worker's rows of an end, [B, d]."""
        if end not in self._rows:
            rows = self.tensors[end.side][end.name]
            self._rows[end] = functional.normalize(rows, dim=1) if end.unit else rows
        return self._rows[end]

    def columns(self, end: End) -> torch.Tensor:
        """The rows of all workers, [C, d]."""
        if end not in self._columns:
            self._columns[end] = self.batch.gather(self.rows(end))
        return self._columns[end]

    def products(self, anchor: End, positive: End) -> torch.Tensor:
        """Dot products of this worker's anchors with all workers' positives, [B, C]."""
        key = (anchor, positive)
        reverse = self._products.get((positive, anchor))
        # A worker alone has all rows, and so the reverse search as well.
        if reverse is not None and reverse.shape[0] == reverse.shape[1]:
            return reverse.T
        if key not in self._products:
            self._products[key] = self.rows(anchor) @ self.columns(positive).T
        return self._products[key]

    def excluded(self, mask: str, rows: int, columns: int) -> torch.Tensor | None:
        """Mark the columns that are no negatives of a row, bool [B, C]; None for no mask.

        Args:
            mask: `none`, `same` or `known`; see `TermConfig.mask`.
            rows: side of the rows.
            columns: side of the columns.

        Raises:
            ValueError: when `known` lacks `AlignmentBatch.known`.
        """
        if mask == "none":
            return None
        if mask == "same":
            return self._shared()
        batch = self.batch
        if batch.known is None:
            raise ValueError("batch.known must be given for a term with mask known, got None.")
        found = batch.known.between(self.items[rows], batch.gather(self.items[columns]))
        return self._shared() | off_diagonal(found, batch.rank)

    def _shared(self) -> torch.Tensor:
        # No cached_property: in Python 3.10 and 3.11 it holds a lock while other workers' threads
        # would have to gather.
        if self._sharing is None:
            found = _share_an_end(self.items, self.batch)
            if self.users is not None:
                found |= _share_an_end(self.users, self.batch)
            self._sharing = off_diagonal(found, self.batch.rank)
        return self._sharing


def off_diagonal(marked: torch.Tensor, rank: int) -> torch.Tensor:
    """Copy a mask without every row's own column.

    Args:
        marked: bool [B, C].
        rank: row i owns column rank·B + i.
    """
    rows = torch.arange(len(marked), device=marked.device)
    marked = marked.clone()
    marked[rows, rows + rank * len(marked)] = False
    return marked


def _share_an_end(ends: tuple[torch.Tensor, torch.Tensor], batch: AlignmentBatch) -> torch.Tensor:
    """Mark the pairs of the global batch with an item (or user) of a local pair, bool [B, C]."""
    anchor, positive = (end[:, None] for end in ends)
    anchors, positives = (batch.gather(end) for end in ends)
    same = (anchor == anchors) | (positive == positives)
    return same | (anchor == positives) | (positive == anchors)
