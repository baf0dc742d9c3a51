"""What an alignment loss sees of one training step: two sides of a pair after the quantizer.

Knows tensors only. Pairs, teachers and workers are somebody else's; `gather` is all that a loss
learns about other workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

IDENTITY = "identity"
"""Source of batches that are no pairs: the items of a reconstruction step with themselves."""
INTERACTIONS = "interactions"
"""Source of (user, item) events of the train part, each with another item of the user and another
user of the item."""


@dataclass(frozen=True, eq=False)
class View:
    """One side of a batch of pairs, B rows, this worker's share."""

    items: torch.Tensor
    """int64 [B] item indices."""
    inputs: torch.Tensor
    """x, float32 [B, D], scaled as the network reads them."""
    latents: torch.Tensor
    """z, float32 [B, d]."""
    quantized: torch.Tensor
    """z_q, float32 [B, d], the sum of the codewords with straight-through gradient."""
    reconstruction: torch.Tensor
    """Decoder output x̂, float32 [B, D]."""
    middle: torch.Tensor
    """First hidden activation of the decoder, float32 [B, h]."""
    codes: torch.Tensor
    """int64 [B, L], the assignment used while training."""


@dataclass(frozen=True, eq=False)
class UserView:
    """Users on one side of a batch of the source `interactions`, B rows."""

    users: torch.Tensor
    """int64 [B] user indices."""
    inputs: torch.Tensor
    """float32 [B, D_u], e.g. the mean of the vectors of the user's train items."""
    teachers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Frozen vectors of the users, float32 [B, t], by teacher."""


@dataclass(frozen=True, eq=False)
class KnownPairs:
    """Related items, to be looked up for any two items of a batch; 8 bytes a pair."""

    keys: torch.Tensor
    """int64 [P], sorted: smaller item · num_items + larger item."""
    num_items: int

    @classmethod
    def of(cls, anchor: torch.Tensor, positive: torch.Tensor, *, num_items: int) -> KnownPairs:
        """Index pairs of items, in either order and with repetitions.

        Args:
            anchor: int64 [P] items.
            positive: int64 [P] items.
            num_items: more than the largest item; its square must fit 63 bits.
        """
        low, high = torch.minimum(anchor, positive), torch.maximum(anchor, positive)
        return cls(torch.unique(low * num_items + high), num_items)

    def between(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Mark the related pairs among two lists of items.

        Args:
            rows: int64 [B] items.
            columns: int64 [C] items.

        Returns:
            bool [B, C].
        """
        shape = (len(rows), len(columns))
        return self.holds(rows[:, None].expand(shape), columns.expand(shape))

    def holds(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Say of each pair of items whether it is related.

        Args:
            first: int64 items of any shape.
            second: int64 items of the same shape.

        Returns:
            bool of that shape.
        """
        if not len(self.keys):
            return torch.zeros_like(first, dtype=torch.bool)
        wanted = torch.minimum(first, second) * self.num_items + torch.maximum(first, second)
        place = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
        return self.keys[place] == wanted


Gather = Callable[[torch.Tensor], torch.Tensor]
"""Concatenates the rows of all workers, [B, …] → [world·B, …], in rank order, equal B on each.

The gradient of a gathered row is the sum over the workers; they then average their gradients. So a
loss that is a mean over local rows against gathered columns trains as on the concatenated batch.
"""


def alone(rows: torch.Tensor) -> torch.Tensor:
    """The gather of a single worker: the rows themselves."""
    return rows


@dataclass(frozen=True, eq=False)
class AlignmentBatch:
    """One batch of pairs from one source."""

    source: str
    """Where the pairs come from: `identity`, `co_occurrence`, `swing`, `interactions`, …"""
    anchor: View
    positive: View
    """The related items; the same object as `anchor` for the source `identity`."""
    teachers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Frozen vectors of the anchors, float32 [B, t], by teacher; zero where it knows none."""
    user: UserView | None = None
    """Users who chose the anchors; only of the source `interactions`."""
    user_positive: UserView | None = None
    """Other users who chose the anchors."""
    known: KnownPairs | None = None
    """Related items of the train part, for losses that leave them out of the negatives."""
    progress: float = 1.0
    """Share of the training steps that are done, for weights that change."""
    gather: Gather = alone
    rank: int = 0
    """This worker's rows start at `rank`·B of the gathered ones."""
