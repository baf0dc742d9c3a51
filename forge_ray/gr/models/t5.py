"""Encoder-decoder generator: T5 reads a history and writes the codes of the next item.

A training row is one history with one target, its last item; the stream expands a sequence of n
items into its n - 1 prefixes, so that every position but the first is a target once an epoch, or
with `data.targets=last` takes the longest alone. Knows nothing about items or files. The blocks are
those of transformers, initialised from scratch.

Source: TIGER (arXiv 2305.05065) in LETTER's form, and FORGE's T5 recipe (arXiv 2509.20904). We
differ in omitting the end token (every SID has L codes) and, by default, in a softmax over one
level's codes.

Shapes: B rows, N items of a row, L levels, S tokens, W beams, D width, K codes of a level, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from forge_ray.gr.vocab import BOS, PAD, Vocab


@dataclass(kw_only=True)
class T5Config(SizedConfig):
    """A T5 encoder and decoder of `num_layers` blocks each."""

    kind: Literal["t5"] = "t5"
    relative_buckets: int = 32
    """Buckets of the relative position bias (T5's default)."""
    max_distance: int = 128
    """Tokens beyond which distances share one bucket (T5's default)."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        # Half of the buckets are of the other direction, half of the rest of single distances.
        if self.relative_buckets < 4 or self.max_distance <= self.relative_buckets // 2:
            raise ConfigError(
                "model.relative_buckets must be >= 4 and model.max_distance above half of it, got "
                f"{self.relative_buckets} and {self.max_distance}. Use e.g. 32 and 128."
            )

    @property
    def examples(self) -> ExampleMode:
        """See `GeneratorConfig.examples`."""
        return "prefix"

    def build(self, vocab: Vocab) -> T5:
        """Creates the model with fresh weights."""
        return T5(self, vocab)


@dataclass(frozen=True)
class T5State:
    """What `T5.step` needs of the past.

    Attributes:
        cache: keys and values of the encoder and of all fed beams; appended to in place.
        encoded: encoder states [B, S, D].
        mask: bool [B, S].
        tree: ancestry of the beams; BOS is its first step.
        path: int64 [B, W, codes so far], tokens of the beams without BOS.
    """

    cache: Any
    encoded: Tensor
    mask: Tensor
    tree: BeamTree
    path: Tensor


class T5(Generator):
    """See the module docstring."""

    vocab: Vocab
    table: TokenTable
    inputs: DiscRec | None
    fed_inputs: DiscRec | None
    encoder: Any
    decoder: Any

    def __init__(self, config: T5Config, vocab: Vocab) -> None:
        super().__init__()
        self.vocab = vocab
        self.objective = config.objective
        self.table = config.token_table(vocab)
        self.inputs = config.input_module(vocab)
        self.fed_inputs = config.input_module(vocab)
        self.encoder, self.decoder = _stacks(config)

    def num_targets(self, lengths: Tensor) -> int:
        """The codes of the last item of every row that has items."""
        return int((lengths > 0).sum()) * self.vocab.num_levels

    def loss_sum(self, batch: TokenBatch) -> Tensor:
        """Cross-entropy summed over the codes of each row's last item, given those before it."""
        rows, items, levels = batch.codes.shape
        device = batch.codes.device
        history = self.vocab.tokens(batch.codes[:, : items - 1]).reshape(rows, -1)
        is_item = torch.arange(items - 1, device=device) < batch.lengths.unsqueeze(1) - 1
        body_mask = is_item.repeat_interleave(levels, dim=1)
        body = history.masked_fill(~body_mask, PAD)
        # Not from a column of the body, which rows of one item do not have.
        start = torch.full((rows, 1), BOS, dtype=body.dtype, device=device)
        tokens = torch.cat([start, body], dim=1)
        mask = torch.cat([torch.ones_like(start, dtype=torch.bool), body_mask], dim=1)
        last = (batch.lengths - 1).clamp(min=0)
        targets = batch.codes[torch.arange(rows, device=device), last]
        back = items_back(batch.lengths, tokens.shape[1], levels)
        fed = shift_right(self.vocab.tokens(targets))
        hidden = self.decoder(
            inputs_embeds=self._embed_fed(fed),
            encoder_hidden_states=self._encode(tokens, mask, back),
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        counts = batch.lengths > 0
        return self.level_loss_sum(hidden[counts], targets[counts])

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, T5State]:
        """See `Generator.prefill`."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        mask = mask.bool()
        recency = self.vocab.history_recency(tokens.shape[1], tokens.device)
        state = T5State(
            EncoderDecoderCache(DynamicCache(), DynamicCache()),
            self._encode(tokens, mask, recency),
            mask,
            BeamTree.root(len(tokens), tokens.device),
            tokens.new_empty(len(tokens), 1, 0),
        )
        start = torch.full_like(tokens[:, :1], BOS)
        hidden, state = self._feed(state, torch.zeros_like(start), self._embed_fed(start))
        return self.table(hidden[:, 0], 0), state

    def step(
        self, state: T5State, parents: Tensor, codes: Tensor, level: int
    ) -> tuple[Tensor, T5State]:
        """See `Generator.step`."""
        tokens = self.vocab.level_tokens(codes.clamp(min=0), level - 1)
        path = extended(state.path, parents, tokens)
        if self.fed_inputs is None:
            embedded = self.table(tokens)
        else:
            embedded = self.fed_inputs.item(self.table(path))[:, :, -1]
        hidden, state = self._feed(replace(state, path=path), parents, embedded)
        return self.table(hidden, level), state

    def _encode(self, tokens: Tensor, mask: Tensor, recency: Tensor) -> Tensor:
        embedded = self.table(tokens, recency=recency)
        if self.inputs is not None:
            embedded = self.inputs(embedded, tokens == BOS, is_causal=False)
        states = self.encoder(inputs_embeds=embedded, attention_mask=mask)
        return states.last_hidden_state

    def _embed_fed(self, tokens: Tensor) -> Tensor:
        """Inputs [B, S, D] of the decoder for BOS and the first codes of an item."""
        embedded: Tensor = self.table(tokens)
        if self.fed_inputs is None:
            return embedded
        mixed: Tensor = self.fed_inputs(embedded, tokens == BOS, is_causal=True)
        return mixed

    def _feed(self, state: T5State, parents: Tensor, embedded: Tensor) -> tuple[Tensor, T5State]:
        """Hidden states [B, W, D] of one new token per beam.

        The stack's own forward derives positions from the cache's length; here many beams share one
        position, so the blocks are called with a bias built from the tree.
        """
        rows, width = parents.shape
        tree = state.tree.extend(parents)
        hidden = embedded
        own_mask = self._additive(tree.visible())
        history_mask = self._additive(state.mask.unsqueeze(1).expand(rows, width, -1))
        bias = self._position_bias(tree)
        no_bias = torch.zeros_like(history_mask[:1, :, :1]).expand(1, bias.shape[1], 1, -1)
        for block in self.decoder.block:
            hidden, _, _ = block(
                hidden,
                own_mask,
                bias,
                state.encoded,
                history_mask,
                no_bias,
                past_key_values=state.cache,
            )
        hidden = self.decoder.final_layer_norm(hidden)
        return hidden, replace(state, tree=tree)

    def _position_bias(self, tree: BeamTree) -> Tensor:
        """Relative position bias [1, H, 1, keys] between the newest step and every fed code."""
        attention = self.decoder.block[0].layer[0].SelfAttention
        distance = (tree.depths() - (len(tree.widths) - 1)).unsqueeze(0)
        bucket = attention._relative_position_bucket(
            distance,
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return attention.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def _additive(self, allowed: Tensor) -> Tensor:
        """Bool [B, W, keys] as [B, 1, W, keys] of 0 and the lowest float."""
        dtype = self.table.weight.dtype
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return zeros.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def _stacks(config: T5Config) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder without their own embeddings."""
    # Imported here: transformers costs seconds, and many processes only read configs.
    from transformers.models.t5 import T5Config as StackConfig
    from transformers.models.t5.modeling_t5 import T5Stack

    stacks = []
    for is_decoder in (False, True):
        stack = T5Stack(
            StackConfig(
                vocab_size=1,
                d_model=config.hidden_size,
                d_kv=config.hidden_size // config.num_heads,
                d_ff=config.intermediate_size,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.relative_buckets,
                relative_attention_max_distance=config.max_distance,
                dropout_rate=config.dropout,
                is_decoder=is_decoder,
                is_encoder_decoder=is_decoder,
                use_cache=is_decoder,
                attn_implementation=config.attention,
            )
        )
        stack.embed_tokens = nn.Identity()  # embeddings live in TokenTable; no unused weights
        stacks.append(stack)
    return stacks[0], stacks[1]
