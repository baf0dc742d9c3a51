"""The network of the RQ-VAE and one pass of a training batch through its codebooks.

B rows, L levels, d latent width, K codes of a level, D input width. Knows nothing about losses
beyond commitment, about optimisers or where rows come from.
Source: FORGE (arXiv 2509.20904) and its public code; formulas as in `RqVaeConfig`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from forge_ray.sid.quantizers.workers import Workers

if TYPE_CHECKING:
    from forge_ray.sid.quantizers.rq_vae_config import RqVaeConfig


class RqVaeNetwork(nn.Module):
    """Encoder and decoder MLPs and one embedding table per level."""

    encoder: nn.Sequential
    decoder: nn.Sequential
    codebooks: nn.ParameterList

    def __init__(self, config: RqVaeConfig, input_dim: int) -> None:
        super().__init__()
        widths = [input_dim, *config.hidden, config.latent_dim]
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        tables = [torch.empty(size, config.latent_dim) for size in config.codebook_sizes]
        self.codebooks = nn.ParameterList(
            nn.Parameter(nn.init.kaiming_uniform_(table, a=5**0.5)) for table in tables
        )
        self._is_half = config.precision == "bf16"

    def encode(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map inputs [B, D] to float32 latents [B, d], in bf16 inside where the config says so."""
        with self._precision(inputs):
            latents: torch.Tensor = self.encoder(inputs)
        return latents.float()

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map latents [B, d] to float32 reconstructions [B, D] and the first hidden activation."""
        first = 2 if len(self.decoder) > 1 else 0
        with self._precision(latents):
            middle = self.decoder[:first](latents)
            reconstruction: torch.Tensor = self.decoder[first:](middle)
        return reconstruction.float(), middle.float()

    def _precision(self, rows: torch.Tensor) -> AbstractContextManager[None]:
        # Codes that others see are given in float32, whatever the network was trained in.
        is_half = self._is_half and self.training
        return torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=is_half)


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True, eq=False)
class Quantized:
    """One batch after the codebooks."""

    latents: torch.Tensor
    """z, float32 [B, d]."""
    quantized: torch.Tensor
    """z_q, float32 [B, d]: what the decoder saw, its gradient going to the encoder."""
    reconstruction: torch.Tensor
    """float32 [B, D]."""
    middle: torch.Tensor
    """First hidden activation of the decoder, float32 [B, h]."""
    commitment: torch.Tensor
    """Scalar, mean over levels."""
    codes: list[torch.Tensor]
    """Training assignment, int64 [B] per level."""
    nearest: list[torch.Tensor]
    """Inference assignment, int64 [B] per level."""
    residuals: list[torch.Tensor]
    """What each level had to code, float32 [B, d] per level, without gradient."""
    powers: torch.Tensor
    """float32 [2]: mean square of what the codewords leave of the latents, and of the latents."""


@dataclass(frozen=True, eq=False)
class _Walk:
    """What the residual recursion leaves behind."""

    total: torch.Tensor
    """Sum of the codewords that the decoder may see [B, d]."""
    residual: torch.Tensor
    losses: list[torch.Tensor]
    codes: list[torch.Tensor]
    nearest: list[torch.Tensor]
    residuals: list[torch.Tensor]


def quantize(
    network: RqVaeNetwork,
    latents: torch.Tensor,
    config: RqVaeConfig,
    *,
    workers: Workers | None = None,
    depths: torch.Tensor | None = None,
) -> Quantized:
    """Assign a batch of latents to codes and decode the result.

    The running sum q_l carries gradient to the codebooks through the commitment alone; the decoder
    sees a value whose gradient goes to the encoder (straight through, or by the rotation trick).

    Args:
        network: encoder, codebooks and decoder.
        latents: float32 [B, d].
        config: assignment, commitment and gradient.
        workers: who holds the rest of the batch; none by default.
        depths: int64 [B], levels of each row that the decoder sees; all by default.
    """
    walk = _walk(network, latents, config, workers or Workers(), depths)
    carry = rotated if config.rotation_trick else straight_through
    quantized = carry(latents, walk.total.detach())
    reconstruction, middle = network.decode(quantized)
    squares = [walk.residual.square().mean(), latents.detach().square().mean()]
    return Quantized(
        latents=latents,
        quantized=quantized,
        reconstruction=reconstruction,
        middle=middle,
        commitment=torch.stack(walk.losses).mean(),
        codes=walk.codes,
        nearest=walk.nearest,
        residuals=walk.residuals,
        powers=torch.stack(squares),
    )


def _walk(
    network: RqVaeNetwork,
    latents: torch.Tensor,
    config: RqVaeConfig,
    workers: Workers,
    depths: torch.Tensor | None,
) -> _Walk:
    residual = latents.detach()
    total = seen = torch.zeros_like(residual)
    walk = _Walk(total, residual, [], [], [], [])
    last = len(network.codebooks) - 1
    for level, codebook in enumerate(network.codebooks):
        distances = full_distances(residual, codebook.detach())
        nearest = distances.argmin(dim=1)
        code = config.assignment.assign(distances, is_last=level == last, workers=workers)
        code = nearest if code is None else code
        word = functional.embedding(code, codebook)
        quantized = (total if config.commitment == "cumulative" else total.detach()) + word
        walk.losses.append(commitment_loss(latents, quantized, config))
        walk.residuals.append(residual)
        walk.codes.append(code)
        walk.nearest.append(nearest)
        total = total + word
        seen = total if depths is None else torch.where((depths > level)[:, None], total, seen)
        residual = residual - word.detach()
    return _Walk(seen, residual, walk.losses, walk.codes, walk.nearest, walk.residuals)


def full_distances(points: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared L2 distances [B, K] of points [B, d] to codewords [K, d].

    Unlike `base.squared_distances` it keeps |x|^2: balancing standardises over all of them.
    """
    squares = points.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
    return torch.addmm(squares, points, codebook.T, alpha=-2.0)


def commitment_loss(
    latents: torch.Tensor, quantized: torch.Tensor, config: RqVaeConfig
) -> torch.Tensor:
    """Pull latents to codewords, and, without `ema`, codewords to latents; a scalar."""
    distance = functional.mse_loss if config.commitment_loss == "mse" else cosine_loss
    loss = config.encoder_commitment * distance(latents, quantized.detach())
    if config.ema:
        return loss
    return loss + config.codebook_commitment * distance(quantized, latents.detach())


def cosine_loss(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One minus the mean cosine of rows [B, d] and targets [B, d]."""
    return 1 - functional.cosine_similarity(rows, targets, dim=1).mean()


def straight_through(latents: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """The quantised value whose gradient goes unchanged to the latent."""
    return latents + (quantized - latents).detach()


def rotated(latents: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """The quantised value as a fixed rotation and stretch of the latent, which turns the gradient.

    Source: Fifty et al., "Restructuring Vector Quantization with the Rotation Trick"
    (arXiv 2410.06424), section 4.2: q = (|q|/|z|) (z - 2 r (r·z) + 2 q̂ (ẑ·z)), r the unit vector
    of ẑ + q̂; everything but z without gradient. Opposite directions have no such rotation; there
    the sum is 0 and z is only stretched and turned by the last term, which gives q as well.

    Args:
        latents: z, float32 [B, d].
        quantized: q, float32 [B, d], without gradient.

    Returns:
        float32 [B, d], equal to q up to rounding.
    """
    fixed = latents.detach()
    unit_z, unit_q = functional.normalize(fixed, dim=1), functional.normalize(quantized, dim=1)
    between = functional.normalize(unit_z + unit_q, dim=1)
    length = fixed.norm(dim=1, keepdim=True).clamp(min=1e-12)
    stretch = quantized.norm(dim=1, keepdim=True) / length
    mirrored = latents - 2 * between * (latents * between).sum(dim=1, keepdim=True)
    return stretch * (mirrored + 2 * unit_q * (latents * unit_z).sum(dim=1, keepdim=True))
