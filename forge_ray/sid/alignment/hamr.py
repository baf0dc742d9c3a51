"""Pushing latents apart whose codes collide although nothing says that the items are related.

Knows tensors only. B rows of this worker, C = world·B rows of all workers, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from forge_ray.errors import ConfigError
from forge_ray.sid.alignment.batch import Gather, KnownPairs, alone


@dataclass(kw_only=True)
class HamrConfig:
    """Repulsion of latents by the Hamming distance of their codes."""

    weight: float = 0.0
    """Factor of the whole loss; 0 for none, 1 for the paper's."""
    full_weight: float = 0.2
    """Factor for pairs whose codes are all equal."""
    part_weight: float = 0.1
    """Factor for pairs whose codes differ in 1 to `part_distance` levels."""
    full_margin: float = 0.8
    """Cosine distance from which on a fully colliding pair is left alone, 0 to 2."""
    part_margin: float = 0.5
    """The same for partly colliding pairs."""
    part_distance: int = 1
    """Most levels in which the codes of a partly colliding pair differ."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("weight", "full_weight", "part_weight", "full_margin", "part_margin"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"hamr.{name} must be >= 0, got {getattr(self, name)}. Use 0 for none."
                )
        if self.part_distance < 1:
            raise ConfigError(
                f"hamr.part_distance must be >= 1, got {self.part_distance}. "
                "Set hamr.part_weight=0 to leave partial collisions alone."
            )


def hamming_margin(
    config: HamrConfig,
    latents: torch.Tensor,
    codes: torch.Tensor,
    items: torch.Tensor,
    *,
    known: KnownPairs | None = None,
    gather: Gather = alone,
) -> torch.Tensor:
    """Compute λ_full·mean_{H=0} relu(m_full − δ) + λ_part·mean_{0<H≤h} relu(m_part − δ).

    δ is the cosine distance of two latents and H the number of levels in which their codes differ.
    Pairs of one item with itself and pairs known to be related take no part.

    Source: QuaSID (arXiv 2603.00632), margins 0.8 and 0.5. Its contrastive part is a term of
    `alignment` (latents of co-occurring items, temperature 0.1, weight 0.1, mask known).

    Args:
        config: margins and factors.
        latents: z, float [B, d].
        codes: int64 [B, L].
        items: int64 [B].
        known: related items; None to know none.
        gather: rows of all workers. Its mean over workers is the loss of the concatenated rows.

    Returns:
        Scalar, weighted; 0 with gradient 0 when no codes collide.
    """
    with torch.autocast(latents.device.type, enabled=False):
        unit = functional.normalize(latents.to(torch.promote_types(latents.dtype, torch.float32)))
        cosine = unit @ gather(unit).T
    others = gather(items)
    apart = hamming(codes, gather(codes))
    near = (apart <= config.part_distance) & (items[:, None] != others)
    # Few pairs collide, so what is dear is asked of those alone.
    pairs = near.flatten().nonzero().flatten()
    if known is not None:
        first, second = pairs // len(others), pairs % len(others)
        pairs = pairs[~known.holds(items[first], others[second])]
    distance = 1 - cosine.flatten()[pairs]
    is_full = apart.flatten()[pairs] == 0
    loss = config.full_weight * _mean_below(distance, config.full_margin, is_full, gather)
    loss = loss + config.part_weight * _mean_below(distance, config.part_margin, ~is_full, gather)
    return config.weight * loss


def hamming(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Count the levels in which two lists of codes differ.

    Args:
        rows: int64 [B, L].
        columns: int64 [C, L].

    Returns:
        uint8 [B, C].
    """
    rows, columns = rows.int(), columns.int()
    apart = torch.zeros(len(rows), len(columns), dtype=torch.uint8, device=rows.device)
    for level in range(rows.shape[1]):
        apart += (rows[:, level, None] != columns[:, level]).view(torch.uint8)
    return apart


def _mean_below(
    distance: torch.Tensor, margin: float, chosen: torch.Tensor, gather: Gather
) -> torch.Tensor:
    """This worker's sum of relu(margin − distance) over its part of the chosen pairs of all."""
    total = (torch.relu(margin - distance) * chosen).sum()
    counts = gather(chosen.sum().reshape(1)).to(total.dtype)
    return total / counts.mean().clamp(min=1 / len(counts))
