"""Decoder-only generator from a checkpoint: Qwen2 or Llama with codes in its vocabulary.

With a prompt every training row is one history in its prompt with one target, the last item; the
loss is charged on that item's codes alone (and the end token, where asked for), and the head runs
there only. Without one it trains as `Decoder` does. Knows nothing about items or files.

Source: FORGE's Qwen2.5 recipe (arXiv 2509.20904) and LC-Rec (arXiv 2311.09049), next item only; we
differ, by default, in a softmax over one level's codes.

Shapes: B rows, N items of a row, L levels, S tokens, D width, P and Q tokens of the prompt before
and after a history.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from forge_ray.data.examples import ExampleMode
from forge_ray.errors import ConfigError
from forge_ray.gr.models.base import Generator, TokenBatch
from forge_ray.gr.models.decoder import Decoder, DecoderState
from forge_ray.gr.models.packing import KERNEL, register_kernel
from forge_ray.gr.models.pretrained import ExtendedTable, PretrainedConfig, load_checkpoint
from forge_ray.gr.models.prompt import surround, tokenize_prompt
from forge_ray.gr.scripts import START, ScriptBatch, text_entries
from forge_ray.gr.vocab import BOS, PAD, Vocab


@dataclass(kw_only=True)
class PretrainedDecoderConfig(PretrainedConfig):
    """A causal language model from a checkpoint."""

    kind: Literal["pretrained_decoder"] = "pretrained_decoder"
    dropout: float = 0.0
    """Share of the inputs dropped while training; the checkpoint's own attention dropout stays."""
    targets: Literal["all", "last"] = "all"
    """Items of a training row that are targets; a prompt takes `last`, which reads a sequence once
    per item, or once with `data.targets=last`."""
    packing: bool = True
    """See `DecoderConfig.packing`; rows with a prompt are padded."""

    def __post_init__(self) -> None:
        """Checks the rules across fields."""
        super().__post_init__()
        for name, is_asked in (("prompt", not self.prompt.is_empty), ("end_token", self.end_token)):
            if is_asked and self.targets == "all":
                raise ConfigError(
                    f"model.targets must be last with model.{name}, got all. An answer stands "
                    "after one history: set model.targets=last."
                )

    @property
    def examples(self) -> ExampleMode:
        """See `GeneratorConfig.examples`."""
        return "window" if self.targets == "all" else "prefix"

    @property
    def packs(self) -> bool:
        """See `GeneratorConfig.packs`."""
        return self.packing and self.attention == "sdpa" and self.targets == "all"

    @property
    def families(self) -> tuple[str, ...]:
        """See `PretrainedConfig.families`."""
        return ("qwen2", "llama")

    def is_tied(self) -> bool:
        """See `PretrainedConfig.is_tied`."""
        return bool(self.checkpoint.architecture["tie_word_embeddings"])

    def question_sides(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """See `PretrainedConfig.question_sides`: BOS, or a chat around a user's message."""
        if not self.prompt.chat:
            return [START], []
        bare = replace(self.prompt, before="", after="")
        sides = tokenize_prompt(bare, tokenizer)
        return text_entries(sides.before), text_entries(sides.after)

    def build(self, vocab: Vocab) -> PretrainedDecoder:
        """Creates the model with fresh weights."""
        return PretrainedDecoder(self, vocab)

    def load(self, generator: Generator, folder: Path) -> None:
        """See `PretrainedConfig.load`."""
        from transformers import AutoModelForCausalLM

        model = load_checkpoint(AutoModelForCausalLM, folder)
        weights = model.model.state_dict()
        decoder = cast(PretrainedDecoder, generator)
        decoder.blocks.load_state_dict(
            {name: one for name, one in weights.items() if name != "embed_tokens.weight"}
        )
        decoder.table.load_rows(
            model.get_input_embeddings().weight,
            model.get_output_embeddings().weight,
            start=model.config.bos_token_id,
            has_codes=self.checkpoint.num_codes > 0,
        )


class PretrainedDecoder(Decoder):
    """See the module docstring."""

    table: ExtendedTable
    before: Tensor
    after: Tensor

    def __init__(self, config: PretrainedDecoderConfig, vocab: Vocab) -> None:
        # Not Decoder's: its blocks come from sizes, and these from a checkpoint.
        Generator.__init__(self)
        self.vocab = vocab
        self.objective = config.objective
        self.table = config.token_table(vocab)
        self.inputs = None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = _stack(config)
        self._all_items = config.targets == "all"
        self._packs = config.packs
        self._has_end = config.end_token
        found = config.checkpoint
        bos = [] if config.prompt.chat else [BOS]
        before = torch.cat(
            [torch.tensor(bos, dtype=torch.int64), self.table.text_ids(found.before)]
        )
        self.register_buffer("before", before, persistent=False)
        self.register_buffer("after", self.table.text_ids(found.after), persistent=False)
        self._end = found.end

    def num_targets(self, lengths: Tensor) -> int:
        """The codes of every row's target items, and the end tokens where they are targets."""
        if self._all_items:
            return super().num_targets(lengths)
        return int((lengths > 0).sum()) * (self.vocab.num_levels + self._has_end)

    def loss_sum(self, batch: TokenBatch) -> Tensor:
        """Cross-entropy summed over the target tokens of the batch."""
        if self._all_items:
            return super().loss_sum(batch)
        counts = batch.lengths > 0
        codes, lengths = batch.codes, batch.lengths.clamp(min=1)
        targets = codes[torch.arange(len(codes), device=codes.device), lengths - 1]
        tokens, first = self._rows(codes, lengths, targets)
        states = self.blocks(inputs_embeds=self.dropout(self.table(tokens)), use_cache=False)
        place = first + torch.arange(self.vocab.num_levels + 1, device=codes.device)
        place = place.unsqueeze(-1).expand(-1, -1, states.last_hidden_state.shape[-1])
        hidden = states.last_hidden_state.gather(1, place)[counts]
        loss = self.level_loss_sum(hidden[:, :-1], targets[counts])
        if not self._has_end:
            return loss
        smoothing = self.objective.label_smoothing
        return loss + self.table.text_loss_sum(hidden[:, -1], self._end, label_smoothing=smoothing)

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, DecoderState]:
        """See `Generator.prefill`."""
        return super().prefill(*surround(tokens, mask.bool(), self.before, self.after))

    def ask(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, DecoderState]:
        """`prefill` for questions [B, Q], padded on the left: nothing is put around them."""
        return super().prefill(tokens, mask)

    def script_loss_sum(self, scripts: ScriptBatch) -> Tensor:
        """See `Generator.script_loss_sum`; rows are padded on the right, as in `_rows`."""
        answers = scripts.answers
        tokens = torch.cat([scripts.questions, torch.full_like(answers, PAD)], dim=1)
        column = torch.arange(answers.shape[1], device=answers.device)
        place = scripts.question_lengths.unsqueeze(1) + column
        tokens = tokens.scatter(1, place, answers)
        states = self.blocks(
            inputs_embeds=self.dropout(self.table(tokens)), use_cache=False
        ).last_hidden_state
        place = (place - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])
        hidden, is_target = states.gather(1, place), scripts.is_target
        return self.table.answer_loss_sum(hidden[is_target], answers[is_target], self.objective)

    def _rows(self, codes: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Training rows: prompt, history, prompt, target.

        Rows are padded on the right: under a causal mask no valid position sees padding.

        Args:
            codes: int64 [B, N, L].
            lengths: int64 [B], at least 1.
            targets: int64 [B, L], codes of each row's last item.

        Returns:
            tokens int64 [B, P + (N - 1) * L + Q + L], and the column [B, 1] whose state predicts
            the first code.
        """
        rows, items, levels = codes.shape
        history = self.vocab.tokens(codes[:, : items - 1]).reshape(rows, -1)
        sides = [side.expand(rows, -1) for side in (self.before, self.after)]
        tail = torch.cat([sides[1], self.vocab.tokens(targets)], dim=1)
        space = torch.full_like(tail, PAD)
        tokens = torch.cat([sides[0], history, space], dim=1)
        start = len(self.before) + (lengths - 1).unsqueeze(1) * levels
        place = start + torch.arange(tail.shape[1], device=codes.device)
        return tokens.scatter(1, place, tail), start + len(self.after) - 1


def _stack(config: PretrainedDecoderConfig) -> Any:
    """The transformer stack without its own embeddings."""
    from transformers import AutoModel

    # The embeddings that the stack would draw are thrown away at once: let them be small.
    stack_config = config.stack_config()
    stack_config.vocab_size, stack_config.pad_token_id = 1, None
    register_kernel()
    kernel = KERNEL if config.packs else config.attention
    stack = AutoModel.from_config(stack_config, attn_implementation=kernel)
    stack.embed_tokens = nn.Identity()
    return stack
