"""A tiny stepwise generator with known scores, for testing the search without a trained model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MULTIPLIER = 6364136223846793005


class HashGenerator:
    """Logits are a fixed pseudo-random function of the user's tokens and the beam's codes so far.

    The state is one int64 per beam, so a wrong reordering of beams shows as wrong scores. ``score``
    is the oracle: it scores whole SIDs without any search.
    """

    def __init__(self, codebook_sizes: Sequence[int], *, seed: int = 0, decimals: int = 6) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.codebook_sizes = tuple(codebook_sizes)
        self.decimals = decimals
        self.logits = [
            (2 * torch.randn(997, size, generator=generator)).round(decimals=decimals)
            for size in codebook_sizes
        ]
        self.num_steps = 0

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.arange(tokens.shape[1], 0, -1)  # from the right: padding changes nothing
        state = (tokens * mask * weights).sum(dim=1, keepdim=True) * _MULTIPLIER
        return self._read(state, 0).squeeze(1), state

    def step(
        self, state: Tensor, parents: Tensor, codes: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        self.num_steps += 1
        state = self._advance(state.gather(1, parents), codes)
        return self._read(state, level), state

    def score(self, tokens: Tensor, mask: Tensor, sids: Tensor) -> Tensor:
        """Log-probability of every SID for every user, float32 [B, S]."""
        _, state = self.prefill(tokens, mask)
        state = state.expand(-1, len(sids))
        total = torch.zeros(state.shape)
        for level in range(sids.shape[1]):
            log_probs = torch.log_softmax(self._read(state, level), dim=-1)
            column = sids[:, level].expand(state.shape)
            total = total + log_probs.gather(-1, column.unsqueeze(-1)).squeeze(-1)
            state = self._advance(state, column)
        return total

    def _advance(self, state: Tensor, codes: Tensor) -> Tensor:
        return state * _MULTIPLIER + codes + 1

    def _read(self, state: Tensor, level: int) -> Tensor:
        return self.logits[level][(state >> 16) % 997]


def random_codes(
    num_items: int, codebook_sizes: Sequence[int], *, seed: int = 0
) -> np.ndarray[tuple[int, int], np.dtype[np.uint16]]:
    """Independent uniform codes, uint16 [N, L]."""
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, size, num_items) for size in codebook_sizes]
    return np.stack(columns, axis=1).astype(np.uint16)


def random_histories(num_users: int, length: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, S], left padded with random true lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 50, (num_users, length), generator=generator)
    lengths = torch.randint(1, length + 1, (num_users, 1), generator=generator)
    mask = (torch.arange(length) >= length - lengths).to(torch.int64)
    return tokens * mask, mask
