"""Configuration of the RQ-VAE: network, losses, switches, schedule and the choice of its model.

Source: FORGE (arXiv 2509.20904), section 3.1, and its public code; a field says where we differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from forge_ray.embed.teachers import TeacherConfig
from forge_ray.errors import ConfigError
from forge_ray.sid.alignment.diversity import DiversityConfig
from forge_ray.sid.alignment.hamr import HamrConfig
from forge_ray.sid.alignment.presets import AlignmentConfig, ForgeI2iConfig
from forge_ray.sid.alignment.recon import Reconstruction
from forge_ray.sid.metrics.registry import rankable
from forge_ray.sid.quantizers.base import QuantizerConfig
from forge_ray.sid.quantizers.sinkhorn import AssignmentConfig, SinkhornConfig

if TYPE_CHECKING:
    from forge_ray.sid.quantizers.rq_vae import RqVae


@dataclass(kw_only=True)
class SelectionConfig:
    """Which of the models along a training is kept: the best by held-out behaviour, not by loss."""

    checks: int = 4
    """How often the model is measured, evenly over the steps, the last one among them; 0 keeps the
    last model unmeasured."""
    metric: Literal["backoff_bits", "gini", "uniqueness", "embedding_hitrate"] = "backoff_bits"
    """What decides: backoff bits and Gini the lower, uniqueness and embedding hitrate the higher.
    All are taken on validation users and train transitions, never on test."""
    max_items: int = 100_000
    """Most items that are coded for a measurement: those that the sampled users touch; 4·D bytes
    each, on the first worker."""
    max_users: int = 20_000
    """Most validation users read, and ten times as many train users."""

    def __post_init__(self) -> None:
        """Check the counts."""
        for name, least in (("checks", 0), ("max_items", 2), ("max_users", 2)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"quantizer.selection.{name} must be >= {least}, got {getattr(self, name)}. "
                    "Raise it."
                )

    def is_better(self, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
        """Whether the first measurement beats the second; a tie does not."""
        sign = rankable(self.metric, field="quantizer.selection.metric").sign
        return sign * (new[self.metric] - old[self.metric]) > 0


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
    commitment_loss: Literal["mse", "cosine"] = "mse"
    """Distance of latent and codewords: squared error, or 1 − cos. FORGE: mse."""
    encoder_commitment: float = 0.5
    """Weight of the commitment term that moves the encoder."""
    codebook_commitment: float = 0.5
    """Weight of the commitment term that moves the codebooks; unused with `ema`."""
    reconstruction: Reconstruction = "mse"
    """Distance of decoder output and input. FORGE: mse; CoST: contrastive."""
    reconstruction_temperature: float = 0.1
    """Of the contrastive reconstruction; 0.1 in CoST."""
    rotation_trick: bool = False
    """The decoder's gradient reaches the encoder turned with the latent (arXiv 2410.06424) and not
    unchanged. FORGE: a key that nothing reads."""
    random_depth: float = 0.0
    """Share of the rows of which the decoder, and the losses behind it, see a random number of
    first levels only, so that prefixes mean something. PLUM (arXiv 2510.07784): 1."""

    assignment: AssignmentConfig = field(default_factory=SinkhornConfig)
    """Codes while training; inference always takes the nearest codeword."""
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

    alignment: AlignmentConfig = field(default_factory=ForgeI2iConfig)
    """What pulls related items together; `none` for reconstruction alone."""
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    """LETTER's loss on codewords; needs `ema=false`."""
    hamr: HamrConfig = field(default_factory=HamrConfig)
    """QuaSID's repulsion of colliding items; its cost grows with the square of a batch."""
    mixing: Literal["alternate", "masked"] = "alternate"
    """`alternate`: a step is either reconstruction or contrast (FORGE). `masked`: every step holds
    rows of both (TorchEasyRec)."""
    pair_share: float = 0.8
    """Share of contrastive steps (`alternate`) or of pair rows in a batch (`masked`). FORGE: the
    loaders' lengths, about 0.7 on its data."""
    pair_batch_size: int = 512
    """Pairs per contrastive step (`alternate`), of all workers together; its cost grows with the
    square. FORGE: 2048, on GPUs."""

    batch_size: int = 2048
    """Rows per reconstruction step (`alternate`), or per step in all (`masked`), of all workers
    together."""
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
    clip_norm: float | None = None
    """Largest norm of the gradient; null for no bound (FORGE). LC-Rec: 1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: encoder and decoder under autocast while training; codebooks, assignment and losses
    stay in float32. FORGE: fp32."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which of the models along the way is kept."""

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
        if not 0 <= self.random_depth <= 1:
            raise ConfigError(
                f"quantizer.random_depth must be in [0, 1], got {self.random_depth}. Lower it."
            )
        for name in ("reconstruction_temperature", "lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"quantizer.{name} must be > 0, got {value}. Raise it.")
        if self.diversity.weight and self.ema:
            raise ConfigError(
                "quantizer.ema must be false with quantizer.diversity, got true: running means "
                "have no gradient. Set quantizer.ema=false."
            )

    @property
    def pair_sources(self) -> tuple[str, ...]:
        """Names of the pairs that fitting reads."""
        return tuple(self.alignment.sources) if self.pair_share > 0 else ()

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """Teachers that fitting reads, by the name that the alignment uses."""
        return self.alignment.read_teachers(has_pairs=self.pair_share > 0)

    def build(self, input_dim: int, *, seed: int) -> RqVae:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        from forge_ray.sid.quantizers.rq_vae import RqVae

        return RqVae(self, input_dim, seed=seed)
