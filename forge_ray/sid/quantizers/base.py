"""What every quantizer does: fit on vectors, give codes, turn codes back into vectors.

Knows residual codebooks in some latent space and how rows are cut into chunks. Knows neither files
nor clusters, and nothing about the items behind the vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from forge_ray.config import Component
from forge_ray.errors import ConfigError, DataError, TrainingError
from forge_ray.sid.quantizers.nearest import nearest_codes, rank_nearest

FloatArray: TypeAlias = npt.NDArray[np.float32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Report: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Called with a step number and the metrics at that step."""

CHUNK_ROWS = 1024
"""Rows per network or distance call; 1024 x 8192 distances take 32 MB."""


def ignore_report(step: int, metrics: Mapping[str, float]) -> None:
    """Drop training metrics; the default of `Quantizer.fit`."""


@dataclass(frozen=True, eq=False)
class TrainingPairs:
    """Item-to-item pairs whose two ends are rows of the training vectors."""

    anchor: Int64Array
    """int64 [P] rows."""
    positive: Int64Array
    """int64 [P] rows."""
    user: Int64Array | None = None
    """int64 [P] rows of `TrainingSet.users` who chose the anchor and the positive; only of the
    source `interactions`."""
    user_positive: Int64Array | None = None
    """int64 [P] rows of other users who chose the anchor."""

    def __len__(self) -> int:
        return len(self.anchor)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What a quantizer may read while it is fitted: some items of a catalogue, train part only."""

    vectors: FloatArray
    """float32 [n, D]."""
    pairs: Mapping[str, TrainingPairs] = field(default_factory=dict)
    """Related items as rows of `vectors`, by the name of their source, e.g. `co_occurrence`."""
    teachers: Mapping[str, FloatArray] = field(default_factory=dict)
    """Frozen vectors of the same items from another model, float32 [n, t], by teacher."""
    users: FloatArray | None = None
    """float32 [m, D_u] of users, for kinds that read the pair source `interactions`."""
    user_teachers: Mapping[str, FloatArray] = field(default_factory=dict)
    """Frozen vectors of the same users, float32 [m, t], by teacher."""


@dataclass(kw_only=True)
class QuantizerConfig(Component):
    """What every quantizer needs to know; `kind` picks one."""

    kind: str = "rq_kmeans"
    levels: int = 3
    """Codes per SID, L; 3 in FORGE."""
    codebook_size: int = 256
    """Codes per level, K; 8192 in FORGE for 1e8 items, 256 in TIGER for 1e4."""
    sizes: list[int] | None = None
    """Codes per level where levels differ, e.g. [1024, 4096, 32768]; overrides `codebook_size`."""
    max_train_vectors: int = 1_000_000
    """Most vectors held for fitting (a random sample beyond it); 2 GB at 512 floats."""

    def __post_init__(self) -> None:
        """Check the shape of the code space."""
        if self.levels < 1:
            raise ConfigError(
                f"quantizer.levels must be >= 1, got {self.levels}. Set the number of codebooks."
            )
        if self.sizes is not None and len(self.sizes) != self.levels:
            raise ConfigError(
                f"quantizer.sizes must name {self.levels} sizes (quantizer.levels), "
                f"got {self.sizes}. Change one of the two."
            )
        if min(self.codebook_sizes) < 2:
            raise ConfigError(
                f"quantizer codebook sizes must be >= 2, got {list(self.codebook_sizes)}. "
                "Raise quantizer.codebook_size or quantizer.sizes."
            )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes available at each level, length L."""
        return tuple(self.sizes) if self.sizes else (self.codebook_size,) * self.levels

    @property
    def pair_sources(self) -> tuple[str, ...]:
        """Names of the item-to-item pairs that fitting reads; see `TrainingSet.pairs`."""
        return ()

    def build(self, input_dim: int, *, seed: int) -> Quantizer:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        raise NotImplementedError(f"{type(self).__name__} does not build a quantizer")


class Quantizer(ABC):
    """Residual codebooks over a latent space; subclasses say how to reach it and come back.

    A row's codes depend on that row alone: kernels always see chunks of `CHUNK_ROWS` rows, the last
    one padded, so no batch boundary can flip a near tie. Kernels must not write into their chunk.
    """

    input_dim: int
    """Width D of the vectors."""
    codebook_sizes: tuple[int, ...]
    """Codes available at each level, length L."""
    codebooks: list[torch.Tensor]
    """One float32 [K_l, d] per level; empty before `fit` or `load_state_dict`."""
    seed: int
    fit_device: torch.device
    """Where `fit` does its work, set by `to`."""

    def __init__(self, input_dim: int, codebook_sizes: tuple[int, ...], *, seed: int) -> None:
        self.input_dim = input_dim
        self.codebook_sizes = codebook_sizes
        self.codebooks = []
        self.seed = seed
        self.fit_device = torch.device("cpu")
        self._norms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the codebooks live and kernels run."""
        self._require_fitted()
        return self.codebooks[0].device

    @abstractmethod
    def fit(
        self,
        data: TrainingSet,
        *,
        report: Report = ignore_report,
    ) -> None:
        """Learn the codebooks.

        Args:
            data: vectors, at least as many as the largest codebook has codes, and what kinds that
                align read beside them.
            report: called with a step and its metrics, many times.

        Raises:
            ConfigError: when there are fewer vectors than codes.
            DataError: when vectors have another width or are not finite.
            TrainingError: when a loss or codebook becomes non-finite.
        """

    def encode(self, vectors: FloatArray) -> Int64Array:
        """Give every vector its SID: nearest codeword of the residual, level by level.

        Args:
            vectors: float32 [n, D].

        Returns:
            int64 [n, L].
        """
        self._require_fitted()
        self._check_width(vectors)
        return _in_chunks(self._encode_chunk, vectors, device=self.device, width=self.num_levels)

    def codeword_sum(self, codes: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """Sum the codewords of each SID in the latent space.

        Args:
            codes: integer codes [n, l] of the first l <= L levels.

        Returns:
            float32 [n, d].
        """
        self._require_fitted()
        return self._sum(codes).cpu().numpy()

    @torch.no_grad()
    def decode(self, codes: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """Turn SIDs, or their first l levels, back into input vectors.

        Args:
            codes: integer codes [n, l] with l <= L.

        Returns:
            float32 [n, D].
        """
        self._require_fitted()
        pieces = [
            self._from_latent(self._sum(codes[start : start + CHUNK_ROWS])).cpu().numpy()
            for start in range(0, len(codes), CHUNK_ROWS)
        ]
        empty = np.zeros((0, self.input_dim), dtype=np.float32)
        return np.concatenate(pieces) if pieces else empty

    def last_level_candidates(self, vectors: FloatArray, limit: int) -> Int64Array:
        """Rank the last codes under each vector's own prefix, nearest first.

        Args:
            vectors: float32 [n, D].
            limit: candidates per vector.

        Returns:
            int64 [n, min(limit, K_L)]: last-level codes, the vector's own one first.
        """
        width = min(limit, self.codebook_sizes[-1])
        out = np.empty((len(vectors), width), dtype=np.int64)
        for start in range(0, len(vectors), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            out[rows] = rank_nearest(self.last_level_distances(vectors[rows]), limit)
        return out

    def last_level_distances(self, vectors: FloatArray) -> FloatArray:
        """Measure every last code under each vector's own prefix.

        Args:
            vectors: float32 [n, D]; ask for a few thousand rows at a time.

        Returns:
            float32 [n, K_L]: what `encode` minimises, the squared distance of the last residual to
            each codeword (plus the codeword's price, where the last level is balanced).
        """
        self._require_fitted()
        self._check_width(vectors)
        width = self.codebook_sizes[-1]
        return _in_chunks(
            self._last_distances, vectors, device=self.device, width=width, dtype=np.float32
        )

    def item_order(self, num_items: int) -> Int64Array | None:
        """Say whose vector codes each item; None: its own, as in every quantizer but a control.

        Args:
            num_items: catalogue size N.

        Returns:
            int64 [N]: item i gets the codes of the vector of item `order[i]`.
        """
        return None

    def facts(self) -> dict[str, Any]:
        """Return what the fit should leave in the manifest: JSON numbers, text and lists."""
        return {}

    def to(self, device: str | torch.device) -> Quantizer:
        """Move the codebooks, and the work of a later `fit`, to a device and return self."""
        self.fit_device = torch.device(device)
        self.codebooks = [codebook.to(device) for codebook in self.codebooks]
        return self

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return everything `encode` and `decode` need, as named arrays."""
        self._require_fitted()
        return {f"codebook.{i}": book.cpu().numpy() for i, book in enumerate(self.codebooks)}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned."""
        self.codebooks = [
            torch.from_numpy(np.array(state[f"codebook.{level}"], dtype=np.float32))
            for level in range(self.num_levels)
        ]

    @property
    def num_levels(self) -> int:
        """Codes per SID, L."""
        return len(self.codebook_sizes)

    def _to_latent(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors

    def _from_latent(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def _encode_chunk(self, chunk: torch.Tensor) -> torch.Tensor:
        return self._assign(self._to_latent(chunk)).codes

    def _assign(self, latents: torch.Tensor) -> Assignment:
        last = latents
        codes: list[torch.Tensor] = []
        for level, codebook in enumerate(self.codebooks):
            if level:
                last = last - self.codebooks[level - 1][codes[-1]]
            codes.append(nearest_codes(last, codebook, self._offsets(level)))
        return Assignment(torch.stack(codes, dim=1), last)

    def _last_distances(self, chunk: torch.Tensor) -> torch.Tensor:
        last = self._assign(self._to_latent(chunk)).last_residual
        scores = torch.addmm(self._offsets(-1), last, self.codebooks[-1].T, alpha=-2.0)
        return scores + last.square().sum(dim=1, keepdim=True)

    def _offsets(self, level: int) -> torch.Tensor:
        """What is added to -2 <r, c_k> at a level, float32 [K_l]: the squared norms."""
        level %= self.num_levels
        codebook = self.codebooks[level]
        # Norms of 8192 x 512 codewords cost as much as coding 50 rows; a chunk should not pay it.
        if level not in self._norms or self._norms[level][0] is not codebook:
            self._norms[level] = (codebook, codebook.square().sum(dim=1))
        return self._norms[level][1]

    def _sum(self, codes: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
        indices = torch.from_numpy(np.asarray(codes, dtype=np.int64)).to(self.device)
        total = torch.zeros(len(indices), self.codebooks[0].shape[1], device=self.device)
        for level in range(indices.shape[1]):
            total = total + self.codebooks[level][indices[:, level]]
        return total

    def _require_fitted(self) -> None:
        if not self.codebooks:
            raise TrainingError(
                f"{type(self).__name__} must be fitted before use, got none. Call fit or load it."
            )

    def _check_width(self, vectors: FloatArray) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.input_dim:
            raise DataError(
                f"vectors must have shape [n, {self.input_dim}], got {list(vectors.shape)}. "
                "Use the vector space that the quantizer was fitted on."
            )

    def _check_training_set(self, vectors: FloatArray) -> None:
        self._check_width(vectors)
        if len(vectors) < max(self.codebook_sizes):
            raise ConfigError(
                f"quantizer.codebook_size must be <= the number of training vectors, got "
                f"{max(self.codebook_sizes)} codes for {len(vectors)} vectors. "
                "Use smaller codebooks."
            )
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise DataError(
                f"vectors must be finite, got {len(bad)} rows with NaN or infinity (first: "
                f"{bad[0]}). Find them with `forge-ray data validate`."
            )


@dataclass(frozen=True, eq=False)
class Assignment:
    """Codes of some latents, and the residual that the last level had to code."""

    codes: torch.Tensor
    """int64 [n, L]."""
    last_residual: torch.Tensor
    """float32 [n, d], the latent minus its first L - 1 codewords."""


def squared_distances(points: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared L2 distances of points [n, d] to codewords [K, d], up to a constant per point.

    |x|^2 is left out: it moves no argmin and would only add rounding.
    """
    return torch.addmm(codebook.square().sum(dim=1), points, codebook.T, alpha=-2.0)


@torch.no_grad()
def _in_chunks(
    kernel: Callable[[torch.Tensor], torch.Tensor],
    vectors: FloatArray,
    *,
    device: torch.device,
    width: int,
    dtype: npt.DTypeLike = np.int64,
) -> npt.NDArray[Any]:
    """Run a kernel over padded chunks of equal size, so that a row's result is its own."""
    out = np.empty((len(vectors), width), dtype=dtype)
    for start in range(0, len(vectors), CHUNK_ROWS):
        rows = np.ascontiguousarray(vectors[start : start + CHUNK_ROWS], dtype=np.float32)
        count = len(rows)
        # torch refuses to share memory that must not be written, such as a memory map's.
        if count < CHUNK_ROWS or not rows.flags.writeable:
            padded = np.zeros((CHUNK_ROWS, rows.shape[1]), dtype=np.float32)
            padded[:count] = rows
            rows = padded
        out[start : start + count] = kernel(torch.from_numpy(rows).to(device))[:count].cpu().numpy()
    return out
