"""Alignment of quantized items with behaviour: FORGE's item-to-item contrastive loss.

Knows batches of inputs and reconstructions; nothing about codebooks or where pairs come from.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class PairContrast(nn.Module):
    """Pulls the reconstructions of related items together, and each towards the raw inputs.

    Three symmetric InfoNCE terms with a learned temperature each, averaged: quantised a with
    quantised b, quantised a with raw b (and b with raw a), quantised with its own raw input.

    Source: FORGE (arXiv 2509.20904), Eq. 2 and the public code. We add the clamp, the normalisation
    of raw inputs and the mask of false negatives, all off at FORGE's values.
    """

    log_scales: nn.Parameter
    """float32 [3], logarithms of the inverse temperatures."""

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        max_scale: float | None = None,
        normalize_inputs: bool = False,
    ) -> None:
        """Set up the three temperatures.

        Args:
            temperature: initial temperature of all three terms.
            max_scale: upper bound of 1/temperature; None leaves it free.
            normalize_inputs: use unit raw inputs instead of the vectors as they are.
        """
        super().__init__()
        self.log_scales = nn.Parameter(torch.full((3,), math.log(1 / temperature)))
        self.max_scale = max_scale
        self.normalize_inputs = normalize_inputs

    def forward(
        self,
        quantized: tuple[torch.Tensor, torch.Tensor],
        raw: tuple[torch.Tensor, torch.Tensor],
        *,
        false_negatives: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss of one batch of pairs (a, b).

        Args:
            quantized: decoder outputs of a and b, float [B, D] each.
            raw: inputs of a and b, float [B, D] each.
            false_negatives: bool [B, B]; True where column j is no negative of row i.

        Returns:
            Scalar: mean of the three terms.
        """
        u, v = (functional.normalize(x, dim=1) for x in quantized)
        a, b = (functional.normalize(x, dim=1) if self.normalize_inputs else x for x in raw)
        scales = self.log_scales.exp()
        if self.max_scale is not None:
            scales = scales.clamp(max=self.max_scale)
        between = u @ v.T
        terms = (
            (between, between.T),
            (u @ b.T, v @ a.T),
            (u @ a.T, v @ b.T),
        )
        losses = [
            (_info_nce(s * x, false_negatives) + _info_nce(s * y, false_negatives)) / 2
            for s, (x, y) in zip(scales, terms, strict=True)
        ]
        return torch.stack(losses).mean()


def false_negatives_of(anchor: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Mark the in-batch negatives that are the same item or share the pair's other end.

    Args:
        anchor: int64 [B] items.
        positive: int64 [B] items.

    Returns:
        bool [B, B], symmetric and False on the diagonal.
    """
    same = anchor[:, None] == anchor
    same |= positive[:, None] == positive
    same |= (anchor[:, None] == positive) | (positive[:, None] == anchor)
    return same.fill_diagonal_(False)


def _info_nce(logits: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    return functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
