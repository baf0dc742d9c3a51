"""The paired control: another quantizer's SIDs, dealt out to the wrong items.

Every symbol statistic (usage, entropy, Gini, collisions) is that of the inner quantizer to the last
digit; what a SID says about its item is gone. A metric that cannot tell the two apart measures
symbols, not meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import (
    FloatArray,
    Int64Array,
    Quantizer,
    QuantizerConfig,
    Report,
    TrainingSet,
    ignore_report,
)
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig

_COMMON = ("levels", "codebook_size", "sizes", "max_train_vectors")


@dataclass(kw_only=True)
class ShuffledConfig(QuantizerConfig):
    """Which quantizer to shuffle, and how.

    What all quantizers have (`levels`, `codebook_size`, `sizes`, `max_train_vectors`) may be set
    here or in `of`: both end up equal, so that a sweep over `quantizer.levels` reaches this kind as
    well.
    """

    kind: Literal["shuffled"] = "shuffled"
    of: QuantizerConfig = field(default_factory=RqKmeansConfig)
    """The quantizer that is fitted; any kind but `shuffled`."""
    shuffle_seed: int = 0
    """Which permutation; the seed of the fit stays that of the inner quantizer."""

    def __post_init__(self) -> None:
        """Make the common fields of the two configurations equal, and check them."""
        if isinstance(self.of, ShuffledConfig):
            raise ConfigError(
                "quantizer.of.kind must not be 'shuffled', got it. Name the inner quantizer."
            )
        if self.shuffle_seed < 0:
            raise ConfigError(
                f"quantizer.shuffle_seed must be >= 0, got {self.shuffle_seed}. Use another seed."
            )
        defaults = {one.name: one.default for one in fields(QuantizerConfig)}
        agreed = {name: self._agreed(name, defaults[name]) for name in _COMMON}
        self.of = replace(self.of, **agreed)
        for name, value in agreed.items():
            setattr(self, name, value)
        super().__post_init__()

    def _agreed(self, name: str, default: Any) -> Any:
        here, inside = getattr(self, name), getattr(self.of, name)
        if here != inside and default not in (here, inside):
            raise ConfigError(
                f"quantizer.{name} must equal quantizer.of.{name}, got {here} and {inside}. "
                "Set one of the two."
            )
        return inside if here == default else here

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes available at each level, length L."""
        return self.of.codebook_sizes

    @property
    def pair_sources(self) -> tuple[str, ...]:
        """Names of the item-to-item pairs that fitting reads."""
        return self.of.pair_sources

    def build(self, input_dim: int, *, seed: int) -> Shuffled:
        """Make an unfitted quantizer for vectors of width `input_dim`."""
        return Shuffled(self.of.build(input_dim, seed=seed), shuffle_seed=self.shuffle_seed)


class Shuffled(Quantizer):
    """An inner quantizer whose codes belong to other items.

    All it does to a vector is what the inner one does; `item_order` alone says that item i is coded
    by somebody else's vector.
    """

    inner: Quantizer
    shuffle_seed: int

    def __init__(self, inner: Quantizer, *, shuffle_seed: int) -> None:
        super().__init__(inner.input_dim, inner.codebook_sizes, seed=inner.seed)
        self.inner = inner
        self.shuffle_seed = shuffle_seed

    def fit(self, data: TrainingSet, *, report: Report = ignore_report) -> None:
        """Fit the inner quantizer.

        Args:
            data: what the inner quantizer reads.
            report: passed on.
        """
        self.inner.fit(data, report=report)
        self._share()

    def item_order(self, num_items: int) -> Int64Array:
        """Draw whose vector codes each item.

        Args:
            num_items: catalogue size N.

        Returns:
            int64 [N], a permutation fixed by `shuffle_seed` and N.
        """
        return np.random.default_rng(self.shuffle_seed).permutation(num_items)

    def encode(self, vectors: FloatArray) -> Int64Array:
        """Give every vector the inner quantizer's SID, int64 [n, L]."""
        return self.inner.encode(vectors)

    def codeword_sum(self, codes: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """Sum the codewords of each SID in the latent space, float32 [n, d]."""
        return self.inner.codeword_sum(codes)

    def decode(self, codes: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """Turn SIDs, or their first levels, into the vectors they were made from."""
        return self.inner.decode(codes)

    def last_level_candidates(self, vectors: FloatArray, limit: int) -> Int64Array:
        """Rank the last codes under each vector's own prefix, int64 [n, min(limit, K_L)]."""
        return self.inner.last_level_candidates(vectors, limit)

    def last_level_distances(self, vectors: FloatArray) -> FloatArray:
        """Measure every last code under each vector's own prefix, float32 [n, K_L]."""
        return self.inner.last_level_distances(vectors)

    def facts(self) -> dict[str, Any]:
        """Return the inner quantizer's facts."""
        return self.inner.facts()

    def to(self, device: str | torch.device) -> Shuffled:
        """Move the inner quantizer to a device and return self."""
        self.inner.to(device)
        self._share()
        return self

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return the inner quantizer's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned."""
        self.inner.load_state_dict(state)
        self._share()

    def _share(self) -> None:
        self.codebooks = self.inner.codebooks
