"""Decoder-only generator: a causal language model over code tokens.

By default every item position of a training row is a target, so one pass over N items trains N
predictions of L codes each. Training rows are packed: laid end to end, so that padding costs
nothing. Knows nothing about items or files. The blocks are those of transformers, initialised from
scratch.

Source: LC-Rec (arXiv 2311.09049) and FORGE's Qwen2.5 recipe (arXiv 2509.20904), next item only;
we differ in using code tokens alone (no text vocabulary) and, by default, in a softmax over one
level's codes.

Shapes: B rows, N items of a row, L levels, S tokens, W beams, D width, K codes of a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forge_ray.data.examples import ExampleMode
from forge_ray.errors import ConfigError
from forge_ray.gr.models.base import (
    BeamTree,
    Generator,
    SizedConfig,
    TokenBatch,
    TokenTable,
    items_back,
    shift_right,
)
from forge_ray.gr.models.discrec import DiscRec, extended
from forge_ray.gr.models.packing import KERNEL, Packing, register_kernel
from forge_ray.gr.vocab import BOS, Vocab


@dataclass(kw_only=True)
class DecoderConfig(SizedConfig):
    """A Qwen2 or Llama stack over code tokens."""

    kind: Literal["decoder"] = "decoder"
    family: Literal["qwen2", "llama"] = "qwen2"
    """Block type: Qwen2 has biases on queries, keys and values; Llama has none."""

    targets: Literal["all", "last"] = "all"
    """Items of a training row that are targets. `all` reads every sequence once an epoch; `last`
    reads it once per item, each time with that item last, as T5 does (`data.targets=last`: once,
    up to its last item)."""
    packing: bool = True
    """Whether training rows are laid end to end instead of padded to the longest; the loss is the
    same. Eager attention always pads."""

    def __post_init__(self) -> None:
        """Checks the rules across fields."""
        super().__post_init__()
        if self.recency_embeddings and self.targets == "all":
            raise ConfigError(
                "model.recency_embeddings must be 0 with model.targets=all, got "
                f"{self.recency_embeddings}. Recency counts back from one target: set "
                "model.targets=last."
            )

    @property
    def examples(self) -> ExampleMode:
        """See `GeneratorConfig.examples`."""
        return "window" if self.targets == "all" else "prefix"

    @property
    def packs(self) -> bool:
        """See `GeneratorConfig.packs`."""
        return self.packing and self.attention == "sdpa"

    def build(self, vocab: Vocab) -> Decoder:
        """Creates the model with fresh weights."""
        return Decoder(self, vocab)


@dataclass(frozen=True)
class DecoderState:
    """What `Decoder.step` needs of the past.

    Attributes:
        cache: keys and values of history and beams; appended to in place.
        history_mask: bool [B, S].
        tree: ancestry of the beams.
        path: int64 [B, W, codes so far], tokens of the beams.
    """

    cache: Any
    history_mask: Tensor
    tree: BeamTree
    path: Tensor


class Decoder(Generator):
    """See the module docstring."""

    vocab: Vocab
    table: TokenTable
    inputs: DiscRec | None
    blocks: Any

    def __init__(self, config: DecoderConfig, vocab: Vocab) -> None:
        super().__init__()
        self.vocab = vocab
        self.objective = config.objective
        self.table = config.token_table(vocab)
        self.inputs = config.input_module(vocab)
        self._all_items = config.targets == "all"
        self._packs = config.packs
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = causal_stack(config)

    def num_targets(self, lengths: Tensor) -> int:
        """The codes of every row's target items."""
        items = lengths.sum() if self._all_items else (lengths > 0).sum()
        return int(items) * self.vocab.num_levels

    def loss_sum(self, batch: TokenBatch) -> Tensor:
        """Cross-entropy summed over the codes of all target items of the batch."""
        # A batch without items has nothing to pack, but its backward pass must reach all weights.
        if self._packs and bool(batch.lengths.any()):
            return self._packed_loss_sum(batch)
        rows, items, levels = batch.codes.shape
        tokens = shift_right(self.vocab.tokens(batch.codes).reshape(rows, items * levels))
        # Rows are padded on the right: under a causal mask no valid position sees padding, so the
        # kernel's built-in causal path serves and no mask is built.
        embedded = self._embed(tokens, items_back(batch.lengths, items * levels, levels))
        states = self.blocks(inputs_embeds=self.dropout(embedded), use_cache=False)
        hidden = states.last_hidden_state.reshape(rows, items, levels, -1)
        item = torch.arange(items, device=tokens.device)
        last = batch.lengths.unsqueeze(1) - 1
        is_target = item <= last if self._all_items else item == last
        return self.level_loss_sum(hidden[is_target], batch.codes[is_target])

    def _packed_loss_sum(self, batch: TokenBatch) -> Tensor:
        levels = self.vocab.num_levels
        packing = Packing.of(batch.lengths, levels)
        codes = packing.items(batch.codes)
        tokens = packing.shift_right(self.vocab.tokens(codes).flatten(), BOS)
        embedded = self._embed(tokens, packing.items_back(levels))
        states = self.blocks(
            inputs_embeds=self.dropout(embedded).unsqueeze(0),
            position_ids=packing.positions.unsqueeze(0),
            # Four dimensions are what transformers takes as it is; the packing says who sees whom.
            attention_mask=embedded.new_empty(1, 1, 1, 1),
            packing=packing,
            use_cache=False,
        )
        hidden = states.last_hidden_state.reshape(len(codes), levels, -1)
        if not self._all_items:
            hidden, codes = hidden[packing.last_items], codes[packing.last_items]
        return self.level_loss_sum(hidden, codes)

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, DecoderState]:
        """See `Generator.prefill`."""
        from transformers.cache_utils import DynamicCache

        mask = mask.bool()
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        # A padded query sees itself only: a row without any key would be NaN.
        itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
        allowed = (causal & mask.unsqueeze(1)) | itself
        cache = DynamicCache()
        embedded = self._embed(tokens, self.vocab.history_recency(length, tokens.device))
        hidden = self._attend(embedded, (mask.cumsum(1) - 1).clamp(min=0), allowed, cache)
        tree = BeamTree.root(len(tokens), tokens.device)
        path = tokens.new_empty(len(tokens), 1, 0)
        return self.table(hidden[:, -1], 0), DecoderState(cache, mask, tree, path)

    def step(
        self, state: DecoderState, parents: Tensor, codes: Tensor, level: int
    ) -> tuple[Tensor, DecoderState]:
        """See `Generator.step`."""
        rows, width = codes.shape
        tree = state.tree.extend(parents)
        history = state.history_mask.unsqueeze(1).expand(rows, width, -1)
        allowed = torch.cat([history, tree.visible()], dim=2)
        position = state.history_mask.sum(dim=1, keepdim=True) + (level - 1)
        tokens = self.vocab.level_tokens(codes.clamp(min=0), level - 1)
        path = extended(state.path, parents, tokens)
        if self.inputs is None:
            embedded = self.table(tokens)
        else:
            embedded = self.inputs.item(self.table(path))[:, :, -1]
        hidden = self._attend(embedded, position.expand(rows, width), allowed, state.cache)
        return self.table(hidden, level), DecoderState(state.cache, state.history_mask, tree, path)

    def _embed(self, tokens: Tensor, recency: Tensor) -> Tensor:
        """Inputs [..., D] of the blocks for whole sequences, each beginning with BOS."""
        embedded: Tensor = self.table(tokens, recency=recency)
        if self.inputs is None:
            return embedded
        mixed: Tensor = self.inputs(embedded, tokens == BOS, is_causal=True)
        return mixed

    def _attend(self, embedded: Tensor, positions: Tensor, allowed: Tensor, cache: Any) -> Tensor:
        """Hidden states [B, Q, D] of embeddings that see `allowed` keys, [B, Q, cached + Q]."""
        states = self.blocks(
            inputs_embeds=embedded,
            attention_mask=self._kernel_mask(allowed.unsqueeze(1)),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return states.last_hidden_state

    def _kernel_mask(self, allowed: Tensor) -> Tensor:
        """Bool as it is for sdpa; the eager kernel adds its mask: 0 and the lowest float."""
        if self.blocks.config._attn_implementation != "eager":
            return allowed
        dtype = self.table.weight.dtype
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


def causal_stack(config: DecoderConfig) -> Any:
    """The transformer stack without its own embeddings."""
    # Imported here: transformers costs seconds, and configs are read by processes that train
    # nothing.
    register_kernel()
    if config.family == "qwen2":
        from transformers.models.qwen2 import Qwen2Config as StackConfig
        from transformers.models.qwen2.modeling_qwen2 import Qwen2Model as Stack
    else:
        from transformers.models.llama import LlamaConfig as StackConfig
        from transformers.models.llama.modeling_llama import LlamaModel as Stack
    stack = Stack(
        StackConfig(
            vocab_size=1,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            attn_implementation=KERNEL if config.packs else config.attention,
        )
    )
    stack.embed_tokens = nn.Identity()  # embeddings live in TokenTable; no unused weights
    return stack
