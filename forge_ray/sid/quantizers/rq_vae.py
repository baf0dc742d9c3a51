"""RQ-VAE: an encoder, residual codebooks in its latent space, a decoder, aligned with behaviour.

Knows inference and how a training is put together; `rq_vae_training` does a step, `rq_vae_run` the
loop, `rq_vae_batches` what a step sees.
Source: FORGE (arXiv 2509.20904), section 3.1, and its public code; see `RqVaeConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from forge_ray.data.permutation import permuted
from forge_ray.errors import DataError
from forge_ray.sid.alignment.batch import KnownPairs
from forge_ray.sid.alignment.module import AlignmentDims
from forge_ray.sid.quantizers.base import (
    FloatArray,
    Quantizer,
    Report,
    TrainingSet,
    ignore_report,
)
from forge_ray.sid.quantizers.rq_vae_batches import BatchPlan, Feed, plan_batches
from forge_ray.sid.quantizers.rq_vae_config import RqVaeConfig
from forge_ray.sid.quantizers.rq_vae_network import RqVaeNetwork
from forge_ray.sid.quantizers.rq_vae_run import Kept, Run, RunHooks
from forge_ray.sid.quantizers.rq_vae_training import State, Trainer
from forge_ray.sid.quantizers.workers import Workers

__all__ = ["DataFacts", "RqVae", "RqVaeConfig", "data_facts"]

_CHUNK = 65_536
"""Rows read at once where all vectors are read."""


class RqVae(Quantizer):
    """Residual codebooks in the latent space of an MLP encoder."""

    config: RqVaeConfig
    network: RqVaeNetwork
    kept: Kept
    """Which state of its training the model is in."""
    scale: float
    """Inputs are divided by it before the encoder, decoder outputs multiplied."""

    def __init__(self, config: RqVaeConfig, input_dim: int, *, seed: int) -> None:
        super().__init__(input_dim, config.codebook_sizes, seed=seed)
        self.config = config
        self.scale = 1.0
        self.kept = Kept()
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
        """Train network and codebooks in this process, and keep the last state.

        Args:
            data: vectors, and the pairs, teachers and users that `alignment` reads.
            report: called every few steps with losses, usage and gradient norms.

        Raises:
            ConfigError: when there are fewer vectors than codes.
            DataError: when pairs or teachers that the alignment reads are missing.
            TrainingError: when a loss is not finite.
        """
        self.train(data, RunHooks(report=report))

    def train(self, data: TrainingSet, hooks: RunHooks, state: State | None = None) -> None:
        """Train in this process, from the start or from a saved state.

        Args:
            data: as for `fit`.
            hooks: reports, measurements and saves.
            state: what `hooks.save` took before; None starts anew.
        """
        self.prepare(data)
        plan = self.plan(data)
        run = Run(self.trainer(plan.total, data_facts(self.config, data)), hooks)
        if state is None:
            run.trainer.start(self.start_rows(data))
        else:
            run.restore(state)
        self.keep(run.finish(Feed(data, plan).batches(run.trainer.step)))

    def prepare(self, data: TrainingSet) -> None:
        """Check a training set and take the scale of its vectors; reads it in chunks."""
        self._check_training_set(data.vectors)
        for source in self.config.pair_sources:
            if source not in data.pairs or not len(data.pairs[source]):
                raise DataError(
                    f"quantizer.alignment must be none for a dataset without {source} pairs, got "
                    f"{self.config.alignment.kind!r} and 0 pairs. Set "
                    "quantizer.alignment.kind=none, or prepare the dataset with pairs."
                )
        missing = sorted(set(self.config.teachers) - set(data.teachers))
        if missing:
            raise DataError(
                f"a training set must hold the teachers that quantizer.alignment reads, got none "
                f"of {', '.join(missing)}. Give their vectors."
            )
        if self.config.unit_variance:
            self.scale = max(_root_mean_square(data.vectors), 1e-12)

    def plan(self, data: TrainingSet) -> BatchPlan:
        """The steps of a run over a training set."""
        sources = self.config.pair_sources
        return plan_batches(
            self.config,
            len(data.vectors),
            {name: len(data.pairs[name]) for name in sources},
            shares=self.config.alignment.sources,
            seed=self.seed,
        )

    def start_rows(self, data: TrainingSet) -> FloatArray:
        """The vectors whose latents the codebooks start from."""
        wanted = max(self.config.kmeans_vectors, *self.codebook_sizes)
        count = min(len(data.vectors), wanted if self.config.kmeans_init else 0)
        rows = permuted(np.arange(count), len(data.vectors), key=(self.seed, 1 << 20))
        return np.asarray(data.vectors[np.sort(rows)], dtype=np.float32)

    def trainer(self, total: int, facts: DataFacts, workers: Workers | None = None) -> Trainer:
        """Set up the training of this model on the device that it is on."""
        config = self.config
        dims = AlignmentDims(
            inputs=self.input_dim,
            latents=config.latent_dim,
            middle=config.hidden[-1] if config.hidden else config.latent_dim,
            teachers=facts.teachers,
            users=facts.users,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            alignment = config.alignment.build(dims, has_pairs=config.pair_share > 0)
        return Trainer(self, alignment, total=total, known=facts.known, workers=workers)

    def keep(self, kept: Kept) -> None:
        """Take the weights that a run chose; the quantizer is fitted afterwards."""
        self.network.load_state_dict(kept.weights)
        self.kept = kept
        self._freeze()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let a model in training encode and decode like a fitted one, for a while."""
        self._freeze()
        yield
        self.codebooks = []
        self.network.train().requires_grad_(True)

    def facts(self) -> dict[str, Any]:
        """Which state was kept, and what was measured of it."""
        return {"kept_step": self.kept.step, "kept_metrics": dict(self.kept.metrics)}

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


@dataclass(frozen=True, eq=False)
class DataFacts:
    """What a trainer must know of its training set before the first batch."""

    teachers: dict[str, int]
    """Width by teacher."""
    users: int
    """Width of user vectors, 0 for none."""
    known: KnownPairs | None
    """Related items, 8 bytes a pair, where a loss leaves them out of the negatives."""


def data_facts(config: RqVaeConfig, data: TrainingSet) -> DataFacts:
    """Sum up a training set for `RqVae.trainer`."""
    terms = config.alignment.list_terms().values()
    is_read = config.hamr.weight > 0 or any(term.mask == "known" for term in terms)
    items = [(p.anchor, p.positive) for p in data.pairs.values() if p.user is None]
    known = None
    if is_read and items:
        ends = [torch.from_numpy(np.concatenate(side)) for side in zip(*items, strict=True)]
        known = KnownPairs.of(ends[0], ends[1], num_items=len(data.vectors))
    return DataFacts(
        teachers={name: array.shape[1] for name, array in data.teachers.items()},
        users=0 if data.users is None else data.users.shape[1],
        known=known,
    )


def _root_mean_square(vectors: FloatArray) -> float:
    """Over all numbers, in float64, by chunks: the vectors may be mapped from a file."""
    total = 0.0
    for start in range(0, len(vectors), _CHUNK):
        total += float(np.square(vectors[start : start + _CHUNK], dtype=np.float64).sum())
    return float(np.sqrt(total / vectors.size))
