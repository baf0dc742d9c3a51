"""Dense order inside a bucket: items closest to what the user read lately come first.

Knows item vectors and histories. Knows nothing about SIDs, beams or files. It refines what the SID
left open and never moves an item past another bucket.

Shapes: N items, D width of a vector, B users, M pairs of user and item.

Source: LIGER (arXiv 2411.18814) and COBRA (arXiv 2503.02453) rank by dense scores inside what
generation found; we take the mean of the history's own vectors for the user, so nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from forge_ray.data.ragged import Ragged

_PAIRS = 1 << 16
"""Pairs scored at a time: 200 MB of gathered vectors at width 384, both sides."""


@dataclass(frozen=True, slots=True)
class Profiles:
    """Users of a batch as vectors; an :class:`forge_ray.gr.buckets.Affinity`.

    Attributes:
        vectors: float32 [N, D], unit rows.
        profiles: float32 [B, D].
    """

    vectors: NDArray[np.float32]
    profiles: NDArray[np.float32]

    def __call__(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.float32]:
        """Inner products of profile and item, float32 [M]."""
        out = np.empty(len(users), np.float32)
        for start in range(0, len(users), _PAIRS):
            part = slice(start, start + _PAIRS)
            left, right = self.profiles[users[part]], self.vectors[items[part]]
            out[part] = np.einsum("md,md->m", left, right)
        return out


@dataclass(frozen=True, slots=True)
class DenseOrder:
    """Makes profiles of users: the mean unit vector of their newest items.

    Attributes:
        vectors: float32 [N, D], unit rows; zero vectors stay zero.
        max_history: newest items of a history that count.
    """

    vectors: NDArray[np.float32]
    max_history: int

    @classmethod
    def of(cls, vectors: NDArray[np.float32], *, max_history: int) -> DenseOrder:
        """From vectors of any length."""
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return cls(vectors / np.maximum(norms, 1e-12), max_history)

    def profiles(self, histories: Ragged) -> Profiles:
        """Profiles of B users; an empty history is zero, so popularity decides."""
        recent = histories.tail(self.max_history)
        means = functional.embedding_bag(
            torch.from_numpy(recent.values.astype(np.int64)),
            torch.from_numpy(self.vectors),
            torch.from_numpy(recent.offsets[:-1]),
            mode="mean",
        )
        return Profiles(self.vectors, means.numpy())
