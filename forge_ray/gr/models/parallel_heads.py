"""One-pass generator: a history of items goes in, a distribution over every level comes out.

An item is one position, the sum of its codes' vectors; a causal transformer reads items, and one
head per level predicts that level's code from the history alone. Levels are independent given the
history, so no code waits for another, and the catalogue is scored exactly (`forge_ray.gr.exact`):
the model suits SIDs without order (product-quantized ones) and long ones. What it cannot say is
that one code excludes another. Knows nothing about items or files.

Source: RPG (arXiv 2506.05781): zero-initialised residual heads, cosine over a temperature against
the input vectors, mean cross-entropy over the levels. Where we differ: Qwen2 blocks instead of
GPT-2, items enter at unit variance, a first position for the empty history, and a bias per code,
since cosines alone hardly express popularity.

Shapes: B rows, N items of a row, L levels, S tokens, W beams, D width, K codes of a level, V token
ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_ray.errors import ConfigError
from forge_ray.gr.models.base import Competitors, Generator, GeneratorConfig, TokenBatch, TokenTable
from forge_ray.gr.models.code_tables import CodeTable, code_rows
from forge_ray.gr.models.decoder import DecoderConfig, causal_stack
from forge_ray.gr.vocab import BOS, Vocab


@dataclass(kw_only=True)
class ParallelHeadsConfig(GeneratorConfig):
    """A causal stack over items with one head per level."""

    kind: Literal["parallel_heads"] = "parallel_heads"
    hidden_size: int = 128
    """Width D of the residual stream."""
    num_layers: int = 2
    """Transformer blocks (RPG's number)."""
    num_heads: int = 4
    """Attention heads; must divide `hidden_size`."""
    intermediate_size: int = 256
    """Width of the feed-forward blocks."""
    temperature: float = 0.07
    """Divides the cosines (RPG's default)."""

    def __post_init__(self) -> None:
        """Checks the rules across fields."""
        super().__post_init__()
        if self.temperature <= 0.0:
            raise ConfigError(
                f"model.temperature must be > 0, got {self.temperature}. Use e.g. 0.07."
            )
        self.stack_config()

    def stack_config(self) -> DecoderConfig:
        """The transformer over items; checks width and heads."""
        return DecoderConfig(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            attention=self.attention,
            packing=False,
        )

    def build(self, vocab: Vocab) -> ParallelHeads:
        """Creates the model with fresh weights."""
        return ParallelHeads(self, vocab)


class CosineTable(TokenTable):
    """Token vectors that score by direction, with a bias per code.

    Attributes:
        bias: [V - specials], starts at 0.
    """

    bias: nn.Parameter

    def __init__(self, vocab: Vocab, width: int, *, temperature: float) -> None:
        super().__init__(vocab, width, is_tied=True, temperature=temperature)
        nn.init.normal_(self.weight, std=width**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocab.size - vocab.num_special))

    def forward(
        self,
        inputs: Tensor,
        level: int | None = None,
        *,
        recency: Tensor | None = None,
        competitors: Competitors = "level",
    ) -> Tensor:
        """See `TokenTable.forward`; the scores are cosines over the temperature, plus the bias."""
        if level is None:
            return super().forward(inputs)
        codes = slice(0, self.vocab.size - self.vocab.num_special)
        if competitors == "level":
            start = self.vocab.level_offsets[level]
            codes = slice(start, start + self.vocab.codebook_sizes[level])
        vectors = functional.normalize(self.weight[self.vocab.num_special :][codes], dim=-1)
        cosines = functional.linear(functional.normalize(inputs, dim=-1), vectors)
        return cosines.float() / self._temperature + self.bias[codes].float()


class LevelHead(nn.Module):
    """A residual head, the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """States [..., D] of one level from states [..., D] of all."""
        out: Tensor = hidden + self.outer(functional.gelu(self.inner(hidden)))
        return out


class ParallelHeads(Generator):
    """See the module docstring."""

    blocks: Any

    def __init__(self, config: ParallelHeadsConfig, vocab: Vocab) -> None:
        super().__init__()
        self.vocab = vocab
        self.objective = config.objective
        self.table = CosineTable(vocab, config.hidden_size, temperature=config.temperature)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = causal_stack(config.stack_config())
        self.heads = nn.ModuleList(LevelHead(config.hidden_size) for _ in vocab.codebook_sizes)
        # Items enter as loud as the blocks answer, whatever the width and the number of levels.
        self._scale = (config.hidden_size / vocab.num_levels) ** 0.5

    def code_tables(self) -> dict[str, CodeTable]:
        """See `Generator.code_tables`; codes have a bias too."""
        return {**super().code_tables(), "table.bias": code_rows(self.vocab)}

    def num_targets(self, lengths: Tensor) -> int:
        """The codes of every item."""
        return int(lengths.sum()) * self.vocab.num_levels

    def loss_sum(self, batch: TokenBatch) -> Tensor:
        """Cross-entropy summed over the codes of all items, each given the items before it."""
        items = batch.codes.shape[1]
        # Rows are padded on the right: under a causal mask no valid position sees padding.
        embedded = self._embed(batch.codes[:, : items - 1])
        states = self.blocks(inputs_embeds=self.dropout(embedded), use_cache=False)
        is_item = torch.arange(items, device=embedded.device) < batch.lengths.unsqueeze(1)
        hidden = self.dropout(states.last_hidden_state[is_item])
        return self.level_loss_sum(self._levels(hidden), batch.codes[is_item])

    def level_logits(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """Reads histories.

        Args:
            tokens: int64 [B, S], left padded, BOS first (`Vocab.history_tokens`).
            mask: bool [B, S], False on padding.

        Returns:
            L logits of the next item, float32 [B, K_level].
        """
        codes, lengths = self.vocab.history_codes(tokens, mask)
        states = self.blocks(inputs_embeds=self._embed(codes), use_cache=False).last_hidden_state
        last = lengths.view(-1, 1, 1).expand(-1, 1, states.shape[-1])
        hidden = self._levels(states.gather(1, last).squeeze(1))
        return [self.table(hidden[:, level], level) for level in range(self.vocab.num_levels)]

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `Generator.prefill`; the state is the logits of all levels."""
        logits = self.level_logits(tokens, mask)
        return logits[0], logits

    def step(
        self, state: list[Tensor], parents: Tensor, codes: Tensor, level: int
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Generator.step`; no code changes what the history said."""
        return state[level].unsqueeze(1).expand(-1, codes.shape[1], -1), state

    def _embed(self, codes: Tensor) -> Tensor:
        """Inputs [B, N + 1, D] of items with codes [B, N, L]: a first position, then they."""
        start = self.table(torch.full((len(codes), 1), BOS, device=codes.device))
        items = self.table(self.vocab.tokens(codes)).sum(dim=2)
        loud = start * self.vocab.num_levels**0.5
        return torch.cat([loud, items], dim=1) * self._scale

    def _levels(self, hidden_MD: Tensor) -> Tensor:
        return torch.stack([head(hidden_MD) for head in self.heads], dim=1)
