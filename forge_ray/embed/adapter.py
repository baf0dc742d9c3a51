"""A residual adapter before quantizing, trained so that items bought together come close.

`x' = x + B A x + Σ_c E_c[side_c]`: a low-rank correction of the vectors and one learned vector for
each value of a side column. Both start at zero, so that untrained the adapter changes nothing. Pure
torch on one device; knows nothing about datasets or files.

Sources: the low-rank residual of Adapted Dense Retrieval; side embeddings as in FORGE
(arXiv 2509.20904); the loss is symmetric InfoNCE over co-occurring pairs with in-batch negatives.
Where we differ: the embedding model stays frozen and the adapter is trained by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from forge_ray.embed.behaviour import FloatArray
from forge_ray.embed.side import SideColumn
from forge_ray.errors import ConfigError, TrainingError

Int64Array: TypeAlias = npt.NDArray[np.int64]
AdapterReport: TypeAlias = Callable[[int, Mapping[str, float]], None]

APPLY_ROWS = 16_384
"""Items adapted at a time."""
REPORT_EVERY = 50
"""Steps between two reported losses."""


@dataclass(kw_only=True)
class AdapterConfig:
    """Training of the adapter; it runs when `rank` is positive or `vectors.side` names columns."""

    rank: int = 0
    """Rank r of the correction; 0 for none, 8 to 64 in the source."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 512
    """Pairs in a step; each pair's negatives are the others, so time grows with its square."""
    learning_rate: float = 3e-3
    """Of Adam."""
    temperature: float = 0.07
    """Divides the cosines."""
    seed: int = 0
    """Fixes the start and the draw of pairs."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("rank", 0), ("steps", 1), ("batch_size", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"vectors.adapter.{name} must be >= {least}, got {getattr(self, name)}. "
                    "Raise it."
                )
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"vectors.adapter.{name} must be > 0, got {getattr(self, name)}. Raise it."
                )


class Adapter(torch.nn.Module):
    """The correction; see the module docstring."""

    down: torch.nn.Parameter
    """A, float32 [r, D]."""
    up: torch.nn.Parameter
    """B, float32 [D, r], zero at the start."""
    tables: torch.nn.ParameterList
    """E_c, one float32 [values, D] per side column, zero at the start."""

    def __init__(
        self, dim: int, *, rank: int, side: Sequence[SideColumn], generator: torch.Generator
    ) -> None:
        super().__init__()
        scale = dim**-0.5
        self.down = torch.nn.Parameter(torch.randn(rank, dim, generator=generator) * scale)
        self.up = torch.nn.Parameter(torch.zeros(dim, rank))
        self.tables = torch.nn.ParameterList(torch.zeros(one.num_values, dim) for one in side)
        self._side = list(side)

    def forward(self, vectors: torch.Tensor, items: Int64Array) -> torch.Tensor:
        """Correct some items.

        Args:
            vectors: float32 [B, D] of the items.
            items: int64 [B], whose side information to add.

        Returns:
            float32 [B, D].
        """
        out = vectors + (vectors @ self.down.T) @ self.up.T
        for column, table in zip(self._side, self.tables, strict=True):
            rows = column.codes.take(items)
            codes = torch.from_numpy(rows.values).to(vectors.device)
            offsets = torch.from_numpy(rows.offsets[:-1]).to(vectors.device)
            out = out + F.embedding_bag(codes, table, offsets, mode="mean")
        return out

    @torch.no_grad()
    def apply_to(self, vectors: FloatArray) -> FloatArray:
        """Correct the whole catalogue.

        Args:
            vectors: float32 [N, D], row i is item i.

        Returns:
            float32 [N, D], `APPLY_ROWS` at a time.
        """
        out = np.empty_like(vectors)
        for start in range(0, len(vectors), APPLY_ROWS):
            items = np.arange(start, min(start + APPLY_ROWS, len(vectors)))
            rows = torch.from_numpy(vectors[items]).to(self.up.device)
            out[items] = self(rows, items).cpu().numpy()
        return out


@dataclass(frozen=True, eq=False)
class PairSampler:
    """Draws related items with probability proportional to their weight."""

    counts: sp.csr_array
    """Non-negative [N, N]."""
    cumulated: npt.NDArray[np.float64]
    """Running sum of the stored entries; 8 bytes each."""

    @classmethod
    def of(cls, counts: sp.csr_array) -> PairSampler:
        """Prepare sampling from symmetric counts."""
        return cls(counts, np.cumsum(counts.data, dtype=np.float64))

    def draw(self, size: int, rng: np.random.Generator) -> tuple[Int64Array, Int64Array]:
        """Anchors and positives, two int64 [size]."""
        drawn = rng.random(size) * self.cumulated[-1]
        entry = np.searchsorted(self.cumulated, drawn, side="right")
        entry = np.minimum(entry, len(self.cumulated) - 1)
        anchor = np.searchsorted(self.counts.indptr, entry, side="right") - 1
        return anchor.astype(np.int64), self.counts.indices[entry].astype(np.int64)


def ignore_adapter_report(step: int, metrics: Mapping[str, float]) -> None:
    """Drop training metrics."""


def train_adapter(
    vectors: FloatArray,
    counts: sp.csr_array,
    config: AdapterConfig,
    *,
    side: Sequence[SideColumn] = (),
    report: AdapterReport = ignore_adapter_report,
) -> Adapter:
    """Train the adapter on co-occurring pairs.

    Args:
        vectors: float32 [N, D].
        counts: symmetric co-occurrence [N, N] of the train part.
        config: rank and training.
        side: side columns of the N items.
        report: called every `REPORT_EVERY` steps, and after the last one, with the mean loss since.

    Returns:
        The trained adapter, on the GPU if there is one. Without any pair it is untrained.

    Raises:
        TrainingError: when the loss is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(config.seed)
    dim = vectors.shape[1]
    adapter = Adapter(dim, rank=config.rank, side=side, generator=generator).to(device)
    if counts.nnz == 0:
        return adapter
    sampler, rng = PairSampler.of(counts), np.random.default_rng(config.seed)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=config.learning_rate)
    losses: list[torch.Tensor] = []
    for step in range(1, config.steps + 1):
        pair = sampler.draw(config.batch_size, rng)
        first, second = (
            adapter(torch.from_numpy(vectors[items]).to(device), items) for items in pair
        )
        loss = pair_loss(first, second, *pair, temperature=config.temperature)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
        if step % REPORT_EVERY == 0 or step == config.steps:
            report(step, {"loss": _finite_mean(losses)})
            losses.clear()
    return adapter


def pair_loss(
    first: torch.Tensor,
    second: torch.Tensor,
    anchors: Int64Array,
    positives: Int64Array,
    *,
    temperature: float,
) -> torch.Tensor:
    """Symmetric InfoNCE with cosine similarity and in-batch negatives.

    Candidates that are the same item as the own positive, or as the anchor itself, are no
    negatives.

    Args:
        first: vectors of the anchors [B, D].
        second: vectors of the positives [B, D].
        anchors: int64 [B] items.
        positives: int64 [B] items.
        temperature: divides the cosines.

    Returns:
        Scalar, the mean of both directions.
    """
    scores = F.normalize(first) @ F.normalize(second).T / temperature
    a, b = (torch.from_numpy(items).to(scores.device) for items in (anchors, positives))
    own = torch.arange(len(a), device=scores.device)
    losses = []
    for logits, query, key in ((scores, a, b), (scores.T, b, a)):
        same = (key[None] == key[:, None]) | (key[None] == query[:, None])
        same.fill_diagonal_(False)
        losses.append(F.cross_entropy(logits.masked_fill(same, -torch.inf), own))
    return (losses[0] + losses[1]) / 2


def _finite_mean(losses: Sequence[torch.Tensor]) -> float:
    value = float(torch.stack(list(losses)).mean())
    if not np.isfinite(value):
        raise TrainingError(
            f"the adapter's loss must be finite, got {value}. Lower vectors.adapter.learning_rate."
        )
    return value


def trains(config: AdapterConfig, side: Sequence[Any]) -> bool:
    """Whether there is anything to train."""
    return config.rank > 0 or bool(side)
