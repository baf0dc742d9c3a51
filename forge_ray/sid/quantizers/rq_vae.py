"""RQ-VAE: an encoder, residual codebooks in its latent space, a decoder, aligned with behaviour.

Knows the configuration, the network and inference. `rq_vae_training` holds the training loop.
Source: FORGE (arXiv 2509.20904), section 3.1, and its public code; a field says where we differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from forge_ray.errors import ConfigError, DataError
from forge_ray.sid.quantizers.base import (
    Quantizer,
    QuantizerConfig,
    Report,
    TrainingSet,
    ignore_report,
)
from forge_ray.sid.quantizers.rq_vae_training import train


@dataclass(kw_only=True)
class RqVaeConfig(QuantizerConfig):
    """Network, losses, switches and schedule of the RQ-VAE; defaults are FORGE's unless said."""

    kind: Literal["rq_vae"] = "rq_vae"
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    latent_dim: int = 64
    """Width d of latents and codewords."""
    unit_variance: bool = True
    """Divide inputs by their overall standard deviation, so that losses of unit-length vectors are
    of order one. FORGE: false."""

    commitment: Literal["cumulative", "residual"] = "cumulative"
    """What moves the codebooks without `ema`: `cumulative` pulls every level's running sum to the
    latent (FORGE); `residual` pulls each codeword to its own residual (LC-Rec, LETTER)."""
    encoder_commitment: float = 0.5
    """Weight of the commitment term that moves the encoder."""
    codebook_commitment: float = 0.5
    """Weight of the commitment term that moves the codebooks; unused with `ema`."""

    sinkhorn: bool = True
    """Balanced assignment while training; inference always takes the nearest codeword."""
    sinkhorn_iterations: int = 5
    sinkhorn_sharpness: float = 10.0
    kmeans_init: bool = True
    """Start the codebooks with residual k-means of the untrained encoder's latents. FORGE: written,
    not run."""
    kmeans_vectors: int = 8192
    """Most latents for the initial k-means, raised to the largest codebook."""
    dead_code_restart: bool = True
    """Move codes that no item chose to random residuals of the batch. FORGE: inert by default."""
    restart_every: int = 50
    """Steps over which a code must be chosen at least once."""
    ema: bool = True
    """Codebooks follow running means of their residuals instead of the commitment gradient: more
    even usage and better neighbourhoods at equal steps. FORGE: true at release, later false."""
    ema_decay: float = 0.99

    i2i: bool = True
    """Align with item-to-item pairs (contrastive steps)."""
    mixing: Literal["alternate", "masked"] = "alternate"
    """`alternate`: a step is either reconstruction or contrast (FORGE). `masked`: every step holds
    rows of both (TorchEasyRec)."""
    pair_share: float = 0.8
    """Share of contrastive steps (`alternate`) or of pair rows in a batch (`masked`). FORGE: the
    loaders' lengths, about 0.7 on its data."""
    pair_batch_size: int = 512
    """Pairs per contrastive step (`alternate`); its cost grows with the square. FORGE: 2048, on
    GPUs."""
    i2i_weight: float = 1.0
    temperature: float = 0.07
    """Initial temperature of the three contrastive terms, learned from there."""
    max_scale: float | None = 100.0
    """Bound of the inverse temperature (TorchEasyRec: 100). FORGE: null."""
    normalize_inputs: bool = True
    """Contrast with unit raw inputs. FORGE: false, on inputs that are nearly unit length."""
    mask_false_negatives: bool = True
    """Leave in-batch negatives that share an item with the pair out. FORGE: false."""

    batch_size: int = 2048
    """Rows per reconstruction step (`alternate`), or per step in all (`masked`)."""
    epochs: int = 150
    """Passes over the vectors by reconstruction steps, at most `max_steps` in all."""
    max_steps: int = 800
    """Bound on all optimiser steps of either type."""
    lr: float = 4e-3
    """Peak rate of AdamW. FORGE: 2e-3 at this batch size, over far more steps."""
    min_lr: float = 1e-7
    warmup: float = 0.1
    """Share of the steps with linearly rising learning rate; cosine decay after it. FORGE: 0.27."""
    weight_decay: float = 1e-4
    """On matrices, codebooks included; none on biases and temperatures."""

    def __post_init__(self) -> None:
        """Check shares, counts and combinations."""
        super().__post_init__()
        for name in (
            "latent_dim",
            "batch_size",
            "pair_batch_size",
            "epochs",
            "max_steps",
            "restart_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"quantizer.{name} must be >= 1, got {getattr(self, name)}. Raise it."
                )
        for name in ("pair_share", "warmup", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"quantizer.{name} must be in [0, 1), got {getattr(self, name)}. Lower it."
                )
        if self.temperature <= 0 or self.lr <= 0:
            raise ConfigError(
                "quantizer.temperature and quantizer.lr must be > 0, "
                f"got {self.temperature} and {self.lr}. Raise them."
            )

    @property
    def pair_sources(self) -> tuple[str, ...]:
        """Names of the item-to-item pairs that fitting reads."""
        return ("co_occurrence",) if self.i2i and self.pair_share > 0 else ()

    def build(self, input_dim: int, *, seed: int) -> RqVae:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        return RqVae(self, input_dim, seed=seed)


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


class RqVae(Quantizer):
    """Residual codebooks in the latent space of an MLP encoder."""

    config: RqVaeConfig
    network: RqVaeNetwork
    scale: float
    """Inputs are divided by it before the encoder, decoder outputs multiplied."""

    def __init__(self, config: RqVaeConfig, input_dim: int, *, seed: int) -> None:
        super().__init__(input_dim, config.codebook_sizes, seed=seed)
        self.config = config
        self.scale = 1.0
        # Layers draw their weights from the global generator; the fork leaves it untouched.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = RqVaeNetwork(config, input_dim)

    def fit(
        self,
        data: TrainingSet,
        *,
        report: Report = ignore_report,
    ) -> None:
        """Train network and codebooks.

        Args:
            data: vectors, and `co_occurrence` pairs with `i2i`.
            report: called every few steps with losses, usage and gradient norms.

        Raises:
            ConfigError: when there are fewer vectors than codes.
            DataError: when `i2i` is on and there are no pairs.
            TrainingError: when a loss is not finite.
        """
        vectors, pairs = data.vectors, data.pairs.get("co_occurrence")
        self._check_training_set(vectors)
        if self.config.pair_sources and (pairs is None or not len(pairs)):
            raise DataError(
                "quantizer.i2i must be false for a dataset without item pairs, got true and "
                "0 pairs. Set quantizer.i2i=false, or prepare the dataset with pairs."
            )
        if self.config.unit_variance:
            self.scale = max(float(np.sqrt(np.square(vectors, dtype=np.float64).mean())), 1e-12)
        train(self, vectors, pairs if self.config.pair_sources else None, report)
        self._freeze()

    def to(self, device: str | torch.device) -> RqVae:
        """Move network and codebooks to a device and return self."""
        self.network.to(device)
        if self.codebooks:
            self._freeze()
        return self

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return network weights and the input scale as named arrays."""
        self._require_fitted()
        arrays = {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}
        return {**arrays, "scale": np.array([self.scale])}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned."""
        weights = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        self.scale = float(weights.pop("scale"))
        self.network.load_state_dict(weights)
        self._freeze()

    def _freeze(self) -> None:
        self.network.eval().requires_grad_(False)
        self.codebooks = [codebook.data for codebook in self.network.codebooks]

    def _to_latent(self, vectors: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self.network.encoder(vectors / self.scale)
        return latents

    def _from_latent(self, latents: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.network.decoder(latents) * self.scale
        return vectors


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
