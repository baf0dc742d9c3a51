"""Random SIDs: the control that every sweep includes and its gate must prune.

A vector's codes are a hash of its bytes: balanced, reproducible and without meaning. The codebooks
are the best ones for that assignment, so every metric that needs a decoder is defined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from forge_ray.data.hashing import hashed_orders, splitmix64
from forge_ray.sid.quantizers.base import (
    FloatArray,
    Int64Array,
    Quantizer,
    QuantizerConfig,
    Report,
    TrainingSet,
    ignore_report,
)


@dataclass(kw_only=True)
class RandomConfig(QuantizerConfig):
    """Codes drawn by a hash of the vector; the control without semantics."""

    kind: Literal["random"] = "random"

    def build(self, input_dim: int, *, seed: int) -> RandomCodes:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        return RandomCodes(input_dim, self.codebook_sizes, seed=seed)


class RandomCodes(Quantizer):
    """Hash codes with mean residuals as codewords."""

    def fit(
        self,
        data: TrainingSet,
        *,
        report: Report = ignore_report,
    ) -> None:
        """Average the residuals of each code.

        Args:
            data: only its vectors are read.
            report: called once per level with the mean squared residual that is left.
        """
        vectors = data.vectors
        self._check_training_set(vectors)
        codes = self._hash_codes(vectors)
        residual = torch.from_numpy(np.array(vectors, dtype=np.float32))
        self.codebooks = []
        for level, size in enumerate(self.codebook_sizes):
            code = torch.from_numpy(codes[:, level])
            count = torch.bincount(code, minlength=size).clamp(min=1)
            sums = torch.zeros(size, self.input_dim).index_add_(0, code, residual)
            codebook = sums / count[:, None]
            residual -= codebook[code]
            self.codebooks.append(codebook)
            report(level, {"residual": float(residual.square().sum(dim=1).mean())})

    def encode(self, vectors: FloatArray) -> Int64Array:
        """Hash every vector to a SID.

        Args:
            vectors: float32 [n, D].

        Returns:
            int64 [n, L].
        """
        self._require_fitted()
        self._check_width(vectors)
        return self._hash_codes(vectors)

    def last_level_candidates(self, vectors: FloatArray, limit: int) -> Int64Array:
        """Rank last codes at random per vector, its own one possibly among them.

        Args:
            vectors: float32 [n, D].
            limit: candidates per vector.

        Returns:
            int64 [n, min(limit, K_L)].
        """
        size = self.codebook_sizes[-1]
        return hashed_orders(_hash_rows(vectors), size, limit, seed=self.seed)

    def last_level_distances(self, vectors: FloatArray) -> FloatArray:
        """Place every last code at its rank among the candidates: no distance means anything here.

        Args:
            vectors: float32 [n, D].

        Returns:
            float32 [n, K_L], a permutation of 0..K_L - 1 in each row.
        """
        ranked = self.last_level_candidates(vectors, self.codebook_sizes[-1])
        return np.argsort(ranked, axis=1).astype(np.float32)

    def _hash_codes(self, vectors: FloatArray) -> Int64Array:
        state = _hash_rows(vectors)
        salts = splitmix64(
            np.arange(self.num_levels, dtype=np.uint64) + np.uint64(self.seed * self.num_levels)
        )
        draws = splitmix64(state[:, None] ^ salts)
        return (draws % np.asarray(self.codebook_sizes, dtype=np.uint64)).astype(np.int64)


def _hash_rows(vectors: FloatArray) -> npt.NDArray[np.uint64]:
    """Hash the bytes of every row, uint64 [n]; equal rows get equal hashes."""
    # Adding zero turns -0.0 into 0.0, so that equal numbers have equal bytes.
    bits = np.ascontiguousarray(vectors + np.float32(0), dtype=np.float32).view(np.uint32)
    state = np.zeros(len(bits), dtype=np.uint64)
    for column in bits.T:
        state = splitmix64(state ^ column)
    return state
