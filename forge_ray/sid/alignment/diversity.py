"""Spreading codewords so that a level's codes are used more evenly.

Knows codebooks and codes; nothing about items. K codes of a level, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from forge_ray.errors import ConfigError
from forge_ray.sid.alignment.equal_groups import equal_groups


@dataclass(kw_only=True)
class DiversityConfig:
    """Codewords of one group attract each other, groups stay apart."""

    weight: float = 0.0
    """Factor of the loss; 0 for none, best at 1e-4 in LETTER. Moves codebooks by their gradient, so
    it needs codebooks that have one."""
    groups: int = 10
    """Groups of equal size per level; 10 in LETTER."""
    temperature: float = 1.0
    """Dot products of codewords are divided by it; 1 in LETTER."""
    every: int = 50
    """Steps after which codewords are grouped anew; an epoch in LETTER."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.weight < 0 or self.temperature <= 0:
            raise ConfigError(
                "diversity.weight must be >= 0 and diversity.temperature > 0, "
                f"got {self.weight} and {self.temperature}. Use weight 0 for none."
            )
        if self.groups < 2 or self.every < 1:
            raise ConfigError(
                "diversity.groups must be >= 2 and diversity.every >= 1, "
                f"got {self.groups} and {self.every}. Raise them."
            )


class CodeDiversity(nn.Module):
    """Groups of codewords, and the loss over them.

    For every row and level: cross-entropy of the row's codeword with another codeword of its group
    against all codewords but itself, mean over rows and levels.

    Source: LETTER (arXiv 2405.07314), `code_diversity`. LETTER draws one codeword of the group at
    random per row; we take the mean over all of them, which is the expectation of the same loss, so
    no draw depends on how rows are spread over workers. A group of one has nobody to attract and
    counts 0.
    """

    group: list[torch.Tensor]
    """int64 [K_l] per level, the group of each code; buffers, so they resume."""

    def __init__(self, config: DiversityConfig, sizes: Sequence[int]) -> None:
        """Set up one group table per level; `regroup` fills them.

        Args:
            config: number of groups and factor.
            sizes: codes K_l of each level.
        """
        super().__init__()
        self.config = config
        for level, size in enumerate(sizes):
            self.register_buffer(f"group_{level}", torch.zeros(size, dtype=torch.int64))

    def regroup(self, codebooks: Sequence[torch.Tensor], *, seed: int) -> None:
        """Cluster every level's codewords into equal groups.

        Args:
            codebooks: float [K_l, d] per level, the same on all workers.
            seed: level l starts from seed + l.
        """
        for level, book in enumerate(codebooks):
            points = book.detach().double().cpu().numpy()
            found = equal_groups(points, self.config.groups, seed=seed + level)
            self.get_buffer(f"group_{level}").copy_(torch.from_numpy(found))

    def forward(
        self, codes: Sequence[torch.Tensor], codebooks: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute the weighted loss.

        Args:
            codes: int64 [B] per level, this worker's rows.
            codebooks: float [K_l, d] per level, with gradient.

        Returns:
            Scalar; its mean over workers is the loss of the concatenated rows.
        """
        losses = [
            self._level(code, book, self.get_buffer(f"group_{level}"))
            for level, (code, book) in enumerate(zip(codes, codebooks, strict=True))
        ]
        return self.config.weight * torch.stack(losses).mean()

    def _level(self, code: torch.Tensor, book: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        # The loss of a row depends on its code alone, so rows of one code are computed once.
        used, counts = torch.unique(code, return_counts=True)
        words, mine = book[used], group[used]
        scores = words @ book.T / self.config.temperature
        own = torch.zeros_like(scores, dtype=torch.bool)
        own[torch.arange(len(used), device=used.device), used] = True
        spread = torch.logsumexp(scores.masked_fill(own, -torch.inf), dim=1)
        members = torch.bincount(group, minlength=self.config.groups)[mine] - 1
        partners = (mine[:, None] == group) & ~own
        pull = (scores * partners).sum(dim=1) / members.clamp(min=1)
        losses = torch.where(members > 0, spread - pull, 0.0)
        return (losses * counts).sum() / len(code)
