"""Balanced code assignment for training: every code of a level gets about as many rows.

Used while a quantizer trains, never at inference, where a code is the nearest codeword.
"""

from __future__ import annotations

import torch

_EPS = 1e-8


@torch.no_grad()
def balanced_assignment(
    distances: torch.Tensor, *, iterations: int, sharpness: float
) -> torch.Tensor:
    """Assign rows to codes so that codes are used evenly.

    Source: FORGE's public code (al_sid, `balanced_argmax`): standardised distances, sharpness 10,
    5 Sinkhorn iterations. Runs in one process, so its row sums need no reduction over ranks.

    Args:
        distances: float [B, K], squared distances up to a constant per row.
        iterations: Sinkhorn normalisations of codes and rows; 0 gives a plain argmin.
        sharpness: factor on the standardised distances; larger is closer to the nearest code.

    Returns:
        int64 [B]: one code per row.
    """
    if iterations == 0:
        return distances.argmin(dim=1)
    num_rows, num_codes = distances.shape
    spread = (distances - distances.mean()) / (distances.std() + 1e-6)
    # In float32 the shares of far rows would be denormal or zero: slow first, then a tie of zeros.
    plan = torch.exp((spread - spread.min()).double().mul_(-sharpness))
    plan /= plan.sum() + _EPS
    for _ in range(iterations):
        plan /= (plan.sum(dim=0, keepdim=True) + _EPS) * num_codes
        plan /= (plan.sum(dim=1, keepdim=True) + _EPS) * num_rows
    return plan.argmax(dim=1)
