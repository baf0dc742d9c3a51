"""What an alignment loss sees of one training step: two sides of a pair after the quantizer.

Knows tensors only. Pairs, teachers and workers are somebody else's; `gather` is all that a loss
learns about other workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


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


def _alone(rows: torch.Tensor) -> torch.Tensor:
    return rows


@dataclass(frozen=True, eq=False)
class AlignmentBatch:
    """One batch of pairs from one source."""

    source: str
    """Where the pairs come from: `identity`, `co_occurrence`, `swing`, …"""
    anchor: View
    positive: View
    """The related items; the same object as `anchor` for the source `identity`."""
    teachers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Frozen vectors of the anchors, float32 [B, t], by teacher."""
    gather: Callable[[torch.Tensor], torch.Tensor] = _alone
    """Concatenates the rows of all workers, [B, …] → [world·B, …], with gradient; this worker's
    rows start at `rank`·B."""
    rank: int = 0
