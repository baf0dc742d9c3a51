"""How far a decoder's output is from its input: three measures that a quantizer may minimise.

Knows tensors only. B rows of this worker, D columns.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch.nn import functional

from forge_ray.sid.alignment.batch import Gather, alone
from forge_ray.sid.alignment.terms import info_nce

Reconstruction: TypeAlias = Literal["mse", "cosine", "contrastive"]


def reconstruction_loss(
    kind: Reconstruction,
    reconstruction: torch.Tensor,
    inputs: torch.Tensor,
    *,
    temperature: float = 0.1,
    gather: Gather = alone,
    rank: int = 0,
) -> torch.Tensor:
    """Compare decoder outputs with their inputs.

    `mse` is the mean over rows and columns, `cosine` the mean of 1 − cos, `contrastive` the InfoNCE
    of CoST: an output finds its input among those of the batch by cosine, and the reverse.

    Source: CoST (arXiv 2404.14774) for `contrastive`, where it stands in place of the MSE; whether
    the paper averages both directions is not certain, we do.

    Args:
        kind: the measure.
        reconstruction: x̂, float [B, D].
        inputs: x, float [B, D].
        temperature: of `contrastive`; 0.1 in CoST.
        gather: rows of all workers; read by `contrastive`.
        rank: this worker's place among the gathered rows.

    Returns:
        Scalar, mean over this worker's rows; with `contrastive` against the rows of all workers.
    """
    if kind == "mse":
        return functional.mse_loss(reconstruction, inputs)
    if kind == "cosine":
        return (1 - functional.cosine_similarity(reconstruction, inputs, dim=1)).mean()
    with torch.autocast(inputs.device.type, enabled=False):
        outputs = functional.normalize(_full(reconstruction), dim=1)
        targets = functional.normalize(_full(inputs), dim=1)
        found = info_nce(outputs @ gather(targets).T / temperature, rank=rank)
        reverse = info_nce(targets @ gather(outputs).T / temperature, rank=rank)
        return (found.mean() + reverse.mean()) / 2


def _full(rows: torch.Tensor) -> torch.Tensor:
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
