"""The transforms of item vectors before quantizing, in their order: smooth, adapt, fuse.

Pure numerics: arrays in, arrays out. Smoothing works in the encoder's own space; the adapter sees
what smoothing left; fusion comes last because it leaves that space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp

from forge_ray.embed.adapter import AdapterConfig, train_adapter, trains
from forge_ray.embed.behaviour import BehaviourConfig, FloatArray, behaviour_vectors, fuse
from forge_ray.embed.graph_smooth import GraphSmoothConfig, nearest, smooth, strongest, unweighted
from forge_ray.embed.side import SideColumn


@dataclass(frozen=True)
class Transforms:
    """Which transforms to apply."""

    smooth: GraphSmoothConfig
    adapter: AdapterConfig
    behaviour: BehaviourConfig
    has_side: bool

    @property
    def any(self) -> bool:
        """Whether the vectors change at all."""
        return self.smooth.gamma > 0 or self.adapts or self.behaviour.alpha > 0

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained."""
        return trains(self.adapter, (True,) * self.has_side)

    @property
    def reads_counts(self) -> bool:
        """Whether co-occurrence of the train part is needed."""
        by_counts = self.smooth.gamma > 0 and self.smooth.graph == "co_occurrence"
        return by_counts or self.adapts or self.behaviour.alpha > 0

    def peak_bytes(self, num_items: int, dim: int, related: int) -> int:
        """Upper bound of the memory that `transform` and its counts take.

        Args:
            num_items: catalogue size N.
            dim: width D.
            related: ordered pairs P with a positive count.

        Returns:
            The largest stage: counting 40·P + 64·N; smoothing 8·N·D + 24·N·k (with 4·N·D + 12·N·k
            more for kNN); adapting 8·N·D + 8·P; factorising 60·P + 20·N·(1.25·d + 8) + 4·N·D;
            fusing 8·N·D + 4·N·d + 16·(D + d)². 300 MB are added for blocks, 12·P + 16·N for what is
            held throughout. Swing takes 16 bytes per user-item on top, which N and P do not tell.
        """
        rows, width = 4 * num_items, self.behaviour.dim
        stages = [40 * related + 64 * num_items]
        if self.smooth.gamma:
            edges = num_items * self.smooth.neighbours
            is_knn = self.smooth.graph == "knn"
            stages.append(2 * rows * dim + 24 * edges + is_knn * (rows * dim + 12 * edges))
        if self.adapts:
            stages.append(2 * rows * dim + 8 * related)
        if self.behaviour.alpha:
            stages.append(60 * related + 5 * rows * int(1.25 * width + 8) + rows * dim)
            stages.append(2 * rows * dim + rows * width + 16 * (dim + width) ** 2)
        held = 12 * related + 16 * num_items
        return max(stages) + held + 300_000_000


@dataclass(frozen=True, eq=False)
class Transformed:
    """Vectors after all transforms."""

    vectors: FloatArray
    """float32 [N, D]."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Figures for the manifest."""


def transform(
    vectors: FloatArray,
    counts: sp.csr_array | None,
    transforms: Transforms,
    *,
    side: Sequence[SideColumn] = (),
) -> Transformed:
    """Apply the transforms; memory as `Transforms.peak_bytes`.

    Args:
        vectors: float32 [N, D], row i is item i.
        counts: co-occurrence [N, N] of the train part; None where nothing reads it.
        transforms: which ones.
        side: side columns of the N items.

    Returns:
        float32 [N, D]; `vectors` themselves when every transform is off.
    """
    facts: dict[str, Any] = {}
    if counts is not None:
        facts["items_with_neighbours"] = round(float((np.diff(counts.indptr) > 0).mean()), 6)
    out = vectors
    if transforms.smooth.gamma:
        graph = _graph(vectors, counts, transforms.smooth)
        out = smooth(vectors, graph, gamma=transforms.smooth.gamma)
    if transforms.adapts:
        assert counts is not None
        curve: list[dict[str, float]] = []
        adapter = train_adapter(
            out,
            counts,
            transforms.adapter,
            side=side,
            report=lambda step, metrics: curve.append({"step": step, **metrics}),
        )
        out = adapter.apply_to(out)
        facts |= {"adapter_loss_curve": curve, "side_values": [one.num_values for one in side]}
    if transforms.behaviour.alpha:
        assert counts is not None
        behaviour = behaviour_vectors(counts, transforms.behaviour.dim)
        out = fuse(out, behaviour, alpha=transforms.behaviour.alpha)
    return Transformed(out, facts)


def _graph(
    vectors: FloatArray, counts: sp.csr_array | None, config: GraphSmoothConfig
) -> sp.csr_array:
    if config.graph == "knn":
        return unweighted(nearest(vectors, config.neighbours))
    assert counts is not None
    return strongest(counts, config.neighbours)
