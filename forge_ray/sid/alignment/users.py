"""Semantic IDs of users while an alignment trains: an RQ-VAE of its own beside the items'.

Only losses read them; inference codes items alone. m user width, d latent width, K codes a level.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from forge_ray.errors import ConfigError
from forge_ray.sid.alignment.batch import Gather


@dataclass(kw_only=True)
class UserTokenizerConfig:
    """Network and codebooks of the user side."""

    levels: int = 3
    """Codes per user; 3 in DAS."""
    codebook_size: int = 512
    """Codes per level; 512 in DAS."""
    latent_dim: int = 64
    """Width d; must equal what a term compares with unless it has a projector. DAS: 32."""
    hidden: list[int] = field(default_factory=lambda: [256])
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    commitment: float = 0.25
    """Weight of the term that moves the encoder to its codewords."""
    ema_decay: float = 0.99
    """Share of a running mean that a batch leaves; codewords follow the means of their residuals.
    Not in DAS."""
    weight: float = 1.0
    """Factor of the user reconstruction and commitment; 1 in DAS."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("levels", 1), ("codebook_size", 2), ("latent_dim", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"alignment users.{name} must be >= {least}, got {getattr(self, name)}. "
                    "Raise it."
                )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(
                f"alignment users.ema_decay must be in [0, 1), got {self.ema_decay}. Lower it."
            )
        if min(self.commitment, self.weight) < 0:
            raise ConfigError(
                "alignment users.commitment and users.weight must be >= 0, "
                f"got {self.commitment} and {self.weight}. Raise them."
            )


@dataclass(frozen=True, eq=False)
class UserCodes:
    """A batch of users after their codebooks."""

    latents: torch.Tensor
    """float32 [B, d]."""
    quantized: torch.Tensor
    """float32 [B, d], with straight-through gradient."""
    codes: list[torch.Tensor]
    """int64 [B] per level."""
    residuals: list[torch.Tensor]
    """What each level had to code, float32 [B, d] per level, without gradient."""
    loss: torch.Tensor
    """Scalar: reconstruction and commitment, unweighted."""


class UserTokenizer(nn.Module):
    """Encoder, residual codebooks and decoder of user vectors, trained with straight-through.

    Source: DAS (arXiv 2508.10584), whose user side is 3 x 512 codes. The loss is
    MSE(x, x̂) + β mean_l ‖r_l − sg(e_l)‖², mean over columns. Codebooks have no gradient; the
    trainer moves them to running means of their residuals, as it does with the items'. A codeword
    that learns by Adam moves at most the rate a step, while the views, cosines of short codeword
    sums, push the latents on by straight-through: these ran away from their codebooks.
    """

    codebooks: nn.ParameterList
    is_started: torch.Tensor
    """Scalar bool; whether the codebooks were put on data."""
    seed: torch.Tensor
    """Scalar int64, of the first codewords."""
    scale: torch.Tensor
    """Scalar; inputs are divided by it, the root mean square of the first batch, so that the loss
    of short vectors counts as much as that of the items."""

    def __init__(self, config: UserTokenizerConfig, input_dim: int) -> None:
        super().__init__()
        self.config = config
        widths = [input_dim, *config.hidden, config.latent_dim]
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        shape = (config.codebook_size, config.latent_dim)
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.zeros(shape), requires_grad=False) for _ in range(config.levels)
        )
        self.register_buffer("is_started", torch.tensor(False))
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, inputs: torch.Tensor, *, gather: Gather) -> UserCodes:
        """Code a batch of users.

        Args:
            inputs: float32 [B, m].
            gather: rows of all workers; used once, to place the codebooks on the first batch.
        """
        if not self.is_started:
            self._start(gather(inputs))
        inputs = inputs / self.scale
        latents = self.encoder(inputs)
        residual = latents
        codes, residuals, losses = [], [], []
        for book in self.codebooks:
            with torch.no_grad():
                code = torch.cdist(residual, book).argmin(dim=1)
            word = functional.embedding(code, book)
            losses.append(self.config.commitment * functional.mse_loss(residual, word))
            codes.append(code)
            residuals.append(residual.detach())
            residual = residual - word
        # What is left of the residual is z − z_q.
        quantized = latents - residual.detach()
        reconstruction = functional.mse_loss(self.decoder(quantized), inputs)
        loss = reconstruction + torch.stack(losses).mean()
        return UserCodes(latents, quantized, codes, residuals, loss)

    @torch.no_grad()
    def _start(self, inputs: torch.Tensor) -> None:
        """Put every level's codewords on residuals of the first batch; the same on all workers."""
        self.scale.copy_(inputs.square().mean().sqrt().clamp(min=1e-12))
        generator = torch.Generator().manual_seed(int(self.seed))
        residual = self.encoder(inputs / self.scale)
        for book in self.codebooks:
            rows = torch.cat(
                [
                    torch.randperm(len(residual), generator=generator)
                    for _ in range(-(-len(book) // len(residual)))
                ]
            )[: len(book)]
            # Noise keeps codewords apart where the batch has fewer users than there are codes.
            noise = torch.randn(book.shape, generator=generator).to(book)
            spread = residual.std() * 0.01
            book.copy_(residual[rows.to(residual.device)] + spread * noise)
            residual = residual - book[torch.cdist(residual, book).argmin(dim=1)]
        self.is_started.fill_(True)


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
