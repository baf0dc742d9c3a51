"""Items outside, codes inside: a transformer over items with a small network over the codes of one.

An item is one position of the history, the sum of its codes' vectors and of vectors of its longer
prefixes. A causal transformer reads items; the codes of the next item come one after the other from
its state and the codes chosen so far. Against a decoder over codes the history is L times shorter
and a code costs a two-layer network instead of a pass through all blocks, in training and in
decoding. Knows nothing about items or files.

Source: RQ-Transformer (arXiv 2203.01941), spatial and depth transformer, for images. Where we
differ: the depth part is a residual two-layer network on the sum of state and code vectors, which
has half the weights of a block; and prefixes of two codes and more have hashed vectors of their
own, after the prefix n-grams of Meta's ranking models (arXiv 2504.02137). Without them a deeper
code means the same under every prefix, which residual codes do not. For the same reason the codes
that follow a prefix are scored by narrow hashed vectors of (prefix, code) beside those of the code:
what one item has in common with a history needs weights of its own, as an item-level model has.

Shapes: B rows, N items of a row, L levels, S tokens, W beams, D width, K codes of a level, M items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_ray.embed.sasrec import CausalBlock
from forge_ray.errors import ConfigError
from forge_ray.gr.models.base import (
    Generator,
    GeneratorConfig,
    TokenBatch,
    TokenTable,
    require_sizes,
)
from forge_ray.gr.models.code_tables import CodeTable, hashed_rows, token_rows
from forge_ray.gr.vocab import BOS, Vocab

_INIT_STD = 0.02
_HASH_BASE = 1_000_003
_HASH_RANGE = 2**31 - 1
_VALUES_AT_ONCE = 1 << 22
"""Numbers of child vectors gathered together, 16 MB: wide beams take no more."""


@dataclass(kw_only=True)
class RqTransformerConfig(GeneratorConfig):
    """A causal transformer over items and a residual network over codes."""

    kind: Literal["rq_transformer"] = "rq_transformer"
    hidden_size: int = 128
    """Width D of the residual stream."""
    num_layers: int = 2
    """Transformer blocks over items."""
    num_heads: int = 4
    """Attention heads; must divide `hidden_size`."""
    intermediate_size: int = 256
    """Width of the feed-forward blocks and of the network over codes."""
    dropout: float = 0.3
    """Share of inputs and block outputs dropped while training."""
    places: int = 64
    """Places of a row with a learned vector: its start, then the items from the oldest on. Must be
    more than `max_history`; later ones would share the last."""
    prefix_rows: int = 32768
    """Rows of each table of hashed vectors for prefixes of two codes and more; 0 has none. About
    the number of distinct prefixes is enough: equal hashes share a row."""
    child_size: int = 32
    """Width E of the vectors that score a code after its prefix, of which there are `prefix_rows`
    too; 0 has none. Training holds 8·E·K bytes for each item of a batch and level but the first."""
    tie_embeddings: bool = True
    """Whether the output head reuses the vectors that histories are read with."""
    temperature: float = 1.0
    """Divides all logits, in the loss and in decoding alike."""

    def __post_init__(self) -> None:
        """Checks the rules across fields."""
        super().__post_init__()
        require_sizes(self, "hidden_size", "num_heads", "intermediate_size")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size must be a multiple of model.num_heads={self.num_heads}, got "
                f"{self.hidden_size}. Set model.hidden_size={32 * self.num_heads}."
            )
        if self.attention != "sdpa":
            raise ConfigError(
                f"model.attention must be sdpa with model.kind={self.kind}, got {self.attention}. "
                "Leave it out."
            )
        lowest = {"num_layers": 1, "places": 1, "prefix_rows": 0, "child_size": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"model.{name} must be >= {least}, got {getattr(self, name)}. Raise it."
                )
        if self.temperature <= 0:
            raise ConfigError(f"model.temperature must be > 0, got {self.temperature}. Use e.g. 1.")

    def check_history(self, max_history: int) -> None:
        """See `GeneratorConfig.check_history`."""
        if self.places <= max_history:
            raise ConfigError(
                f"model.places must be > max_history={max_history}, one for each item and one for "
                f"the start, got {self.places}: the newest items would share the last one, which "
                f"hides their order. Set model.places={max_history + 1}, or lower max_history."
            )

    def build(self, vocab: Vocab) -> RqTransformer:
        """Creates the model with fresh weights."""
        return RqTransformer(self, vocab)


class PrefixTable(nn.Module):
    """Vectors of SID prefixes, hashed into a fixed number of rows."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(rows, width)
        nn.init.normal_(self.vectors.weight, std=_INIT_STD)

    def forward(self, hashes: Tensor) -> Tensor:
        """Vectors [..., D] of prefixes with these hashes [...]."""
        found: Tensor = self.vectors(hashes % self.vectors.num_embeddings)
        return found


class ChildScorer(nn.Module):
    """The arithmetic of child scores, without weights of its own, so that it can be compiled."""

    def forward(
        self, vectors_RE: Tensor, keys_ME: Tensor, hashes_M: Tensor, num_codes: int
    ) -> Tensor:
        """Inner products [M, K] of keys and the hashed vectors of (prefix, code)."""
        codes = torch.arange(num_codes, device=hashes_M.device)
        children = extended(hashes_M.unsqueeze(-1), codes) % len(vectors_RE)
        scores = functional.embedding(children, vectors_RE) @ keys_ME.unsqueeze(-1)
        return scores.squeeze(-1)


class ChildVectors(nn.Embedding):
    """Hashed vectors of (prefix, code), and what keys score by them.

    Keys are scored some at a time, in as many parts as there are, and still in one call: where
    weights are spread over workers (ZeRO 3), every call of a module brings them together, and
    workers with fewer parts would be waited for.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        nn.init.normal_(self.weight, std=_INIT_STD)
        self.scorer = ChildScorer()

    def forward(  # type: ignore[override]  # looks up what it scores
        self, keys_ME: Tensor, hashes_M: Tensor, num_codes: int
    ) -> Tensor:
        """See `ChildScorer.forward`."""
        block = max(1, _VALUES_AT_ONCE // (num_codes * self.embedding_dim))
        parts = zip(torch.split(keys_ME, block), torch.split(hashes_M, block), strict=True)
        # Not a call of the module: ZeRO 3 counts those, and no two workers may differ.
        score = self.scorer.forward
        return torch.cat([score(self.weight, *part, num_codes) for part in parts])


class ChildTable(nn.Module):
    """Scores codes by vectors of (prefix, code), hashed into a fixed number of rows."""

    def __init__(self, config: RqTransformerConfig) -> None:
        super().__init__()
        self.vectors = ChildVectors(config.prefix_rows, config.child_size)
        self.read = nn.Linear(config.hidden_size, config.child_size, bias=False)
        self.temperature = config.temperature

    def forward(self, states_MD: Tensor, hashes_M: Tensor, num_codes: int) -> Tensor:
        """Scores [M, K] of the codes after prefixes with these hashes, in these states."""
        scores: Tensor = self.vectors(self.read(states_MD), hashes_M, num_codes)
        return scores.float() / self.temperature


class CodeNetwork(nn.Module):
    """What the next code is read from: a residual two-layer network and a norm."""

    def __init__(self, config: RqTransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.feed = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, width),
            nn.Dropout(config.dropout),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, states: Tensor) -> Tensor:
        """States [..., D] before and after."""
        read: Tensor = self.norm(states + self.feed(states))
        return read


class ItemReader(nn.Module):
    """The transformer over items: what to expect after each of them."""

    def __init__(self, config: RqTransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.places = nn.Embedding(config.places, width)
        nn.init.normal_(self.places.weight, std=_INIT_STD)
        self.input_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            CausalBlock(width, config.num_heads, config.dropout, feed=config.intermediate_size)
            for _ in range(config.num_layers)
        )

    def forward(self, items_BND: Tensor) -> Tensor:
        """States [B, N, D] of rows that are padded on the right."""
        place = torch.arange(items_BND.shape[1], device=items_BND.device)
        places = self.places(place.clamp(max=self.places.num_embeddings - 1))
        states = self.dropout(self.input_norm(items_BND) + places)
        for block in self.blocks:
            states = block(states)
        read: Tensor = self.norm(states)
        return read


@dataclass(frozen=True)
class RqState:
    """What `RqTransformer.step` needs of the past.

    Attributes:
        sums: float [B, W, D], state of the history plus the vectors of the codes chosen so far.
        hashes: int64 [B, W], of the prefixes chosen so far.
    """

    sums: Tensor
    hashes: Tensor


class RqTransformer(Generator):
    """See the module docstring."""

    def __init__(self, config: RqTransformerConfig, vocab: Vocab) -> None:
        super().__init__()
        width = config.hidden_size
        self.vocab = vocab
        self.objective = config.objective
        self.table = TokenTable(
            vocab, width, is_tied=config.tie_embeddings, temperature=config.temperature
        )
        self.chosen = nn.Embedding(vocab.size, width)
        # Prefixes of two codes and more have vectors; no code follows a whole SID.
        rows, levels = config.prefix_rows, vocab.num_levels
        self.read_prefixes = PrefixTable(rows, width) if rows and levels > 1 else None
        self.chosen_prefixes = PrefixTable(rows, width) if rows and levels > 2 else None
        has_children = bool(rows and config.child_size and levels > 1)
        self.child_scores = ChildTable(config) if has_children else None
        self.levels = nn.Embedding(vocab.num_levels, width)
        for vectors in (self.chosen, self.levels):
            nn.init.normal_(vectors.weight, std=_INIT_STD)
        self.reader = ItemReader(config)
        self.network = CodeNetwork(config)
        self.dropout = nn.Dropout(config.dropout)

    def num_targets(self, lengths: Tensor) -> int:
        """The codes of every item."""
        return int(lengths.sum()) * self.vocab.num_levels

    def loss_sum(self, batch: TokenBatch) -> Tensor:
        """Cross-entropy summed over the codes of all items, each given the items before it."""
        num_items = batch.codes.shape[1]
        states = self._read(batch.codes[:, : num_items - 1])
        is_item = torch.arange(num_items, device=states.device) < batch.lengths.unsqueeze(1)
        codes = batch.codes[is_item]
        return self.level_loss_sum(self.network(self._sums(states[is_item], codes)), codes)

    def code_tables(self) -> dict[str, CodeTable]:
        """See `Generator.code_tables`; prefixes have vectors too."""
        tables = {**super().code_tables(), "chosen.weight": token_rows(self.vocab)}
        last = self.vocab.num_levels - 1
        for name, end in (("read_prefixes", last), ("chosen_prefixes", last - 1)):
            self._add_hashed(tables, name, tuple(range(1, end + 1)))
        self._add_hashed(tables, "child_scores", tuple(range(1, last + 1)))
        return tables

    def _add_hashed(self, tables: dict[str, CodeTable], name: str, levels: tuple[int, ...]) -> None:
        module = getattr(self, name)
        if module is not None:
            count = module.vectors.num_embeddings
            tables[f"{name}.vectors.weight"] = hashed_rows(prefix_hashes, levels, count)

    def compilable(self) -> list[nn.Module]:
        """See `Generator.compilable`."""
        # Child scores move the most memory, and compiled much less. The blocks were measured to
        # gain nothing.
        if self.child_scores is not None:
            return [self.child_scores.vectors.scorer]
        return [*self.reader.blocks, self.network]

    def competing_logits(self, hidden_MD: Tensor, prefixes: Tensor, level: int) -> Tensor:
        """See `Generator.competing_logits`."""
        logits = super().competing_logits(hidden_MD, prefixes, level)
        if level == 0:
            return logits
        return self._with_children(logits, hidden_MD, prefix_hashes(prefixes)[:, -1], level)

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, RqState]:
        """See `Generator.prefill`."""
        codes, lengths = self.vocab.history_codes(tokens, mask)
        states = self._read(codes)
        last = lengths.view(-1, 1, 1).expand(-1, 1, states.shape[-1])
        sums = states.gather(1, last)
        hashes = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)
        return self._logits(sums, hashes, 0).squeeze(1), RqState(sums, hashes)

    def step(
        self, state: RqState, parents: Tensor, codes: Tensor, level: int
    ) -> tuple[Tensor, RqState]:
        """See `Generator.step`."""
        parents, codes = parents.clamp(min=0), codes.clamp(min=0)
        index = parents.unsqueeze(-1).expand(-1, -1, state.sums.shape[-1])
        hashes = extended(state.hashes.gather(1, parents), codes)
        sums = state.sums.gather(1, index) + self._choice(codes, hashes, level - 1)
        return self._logits(sums, hashes, level), RqState(sums, hashes)

    def _logits(self, sums: Tensor, hashes: Tensor, level: int) -> Tensor:
        place = self.levels(torch.tensor(level, device=sums.device))
        states = self.network(sums + place)
        return self._with_children(self.table(states, level), states, hashes, level)

    def _with_children(self, logits: Tensor, states: Tensor, hashes: Tensor, level: int) -> Tensor:
        """Logits [..., C] with what the prefixes' own vectors say of the level's codes."""
        if self.child_scores is None or level == 0:
            return logits
        num_codes = self.vocab.codebook_sizes[level]
        is_full = logits.shape[-1] > num_codes
        start = self.vocab.level_offsets[level] if is_full else 0
        around = (start, logits.shape[-1] - start - num_codes)
        scores = self.child_scores(states.flatten(0, -2), hashes.flatten(), num_codes)
        return logits + functional.pad(scores.view(*hashes.shape, num_codes), around)

    def _read(self, codes: Tensor) -> Tensor:
        """What to expect at the start and after each item: [B, N, L] to [B, N + 1, D]."""
        start = self.table(torch.full((len(codes), 1), BOS, device=codes.device))
        read = self.table(self.vocab.tokens(codes)).sum(dim=2)
        if self.read_prefixes is not None:
            read = read + self.read_prefixes(prefix_hashes(codes)[..., 1:]).sum(dim=2)
        states: Tensor = self.reader(torch.cat([start, read], dim=1))
        return states

    def _sums(self, states_MD: Tensor, codes_ML: Tensor) -> Tensor:
        """What each code of M items is read from, [M, L, D]: their states and the codes before."""
        hashes = prefix_hashes(codes_ML)
        parts = [states_MD]
        for level in range(self.vocab.num_levels - 1):
            choice = self._choice(codes_ML[:, level], hashes[:, level], level)
            parts.append(self.dropout(choice))
        levels = self.levels(torch.arange(self.vocab.num_levels, device=states_MD.device))
        return torch.stack(parts, dim=1).cumsum(dim=1) + levels

    def _choice(self, codes: Tensor, hashes: Tensor, level: int) -> Tensor:
        """Vector of having chosen a code [...] at a level, by a prefix with this hash [...]."""
        choice: Tensor = self.chosen(self.vocab.level_tokens(codes, level))
        if self.chosen_prefixes is not None and level:
            choice = choice + self.chosen_prefixes(hashes)
        return choice


def prefix_hashes(codes: Tensor) -> Tensor:
    """Hashes of the prefixes that end at each code, int64 [..., L] in [0, 2^31 - 1)."""
    hashes = [torch.zeros_like(codes[..., 0])]
    for level in range(codes.shape[-1]):
        hashes.append(extended(hashes[-1], codes[..., level]))
    return torch.stack(hashes[1:], dim=-1)


def extended(hashes: Tensor, codes: Tensor) -> Tensor:
    """Hashes of prefixes [...] with one more code [...]."""
    return (hashes * _HASH_BASE + codes + 1) % _HASH_RANGE
