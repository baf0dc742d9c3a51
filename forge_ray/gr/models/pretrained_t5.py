"""Encoder-decoder generator from a checkpoint: T5 with codes in its vocabulary.

The encoder reads a history in its prompt and an end token, the decoder writes the codes of the next
item. Training rows are those of `T5`. Knows nothing about items or files.

Source: FORGE's T5 recipe (arXiv 2509.20904); we differ, by default, in a softmax over one level's
codes.

Shapes: B rows, N items of a row, L levels, S tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from forge_ray.data.examples import ExampleMode
from forge_ray.errors import ConfigError
from forge_ray.gr.models.base import Generator, TokenBatch, shift_right
from forge_ray.gr.models.pretrained import ExtendedTable, PretrainedConfig, load_checkpoint
from forge_ray.gr.models.prompt import PromptTokens, surround
from forge_ray.gr.models.t5 import T5, T5State
from forge_ray.gr.scripts import ScriptBatch, text_entries
from forge_ray.gr.vocab import BOS, PAD, Vocab


@dataclass(kw_only=True)
class PretrainedT5Config(PretrainedConfig):
    """A T5 from a checkpoint."""

    kind: Literal["pretrained_t5"] = "pretrained_t5"

    def __post_init__(self) -> None:
        """Checks the rules across fields."""
        super().__post_init__()
        if self.prompt.chat:
            raise ConfigError(
                "model.prompt.chat must be false for T5, got true. Its prompt is before and after."
            )

    @property
    def examples(self) -> ExampleMode:
        """See `GeneratorConfig.examples`."""
        return "prefix"

    @property
    def families(self) -> tuple[str, ...]:
        """See `PretrainedConfig.families`."""
        return ("t5",)

    def is_tied(self) -> bool:
        """See `PretrainedConfig.is_tied`; the first T5 is tied, version 1.1 is not."""
        # transformers keeps what the file says about tying under this name.
        return bool(self.checkpoint.architecture["scale_decoder_outputs"])

    def prompt_tokens(self, tokenizer: Any) -> PromptTokens:
        """See `PretrainedConfig.prompt_tokens`: T5's inputs end in its end token."""
        tokens = super().prompt_tokens(tokenizer)
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        return PromptTokens(tokens.before, tokens.after + end)

    def question_sides(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """See `PretrainedConfig.question_sides`: T5's inputs end in its end token."""
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        return [], text_entries(end)

    def build(self, vocab: Vocab) -> PretrainedT5:
        """Creates the model with fresh weights."""
        return PretrainedT5(self, vocab)

    def load(self, generator: Generator, folder: Path) -> None:
        """See `PretrainedConfig.load`."""
        from transformers import T5ForConditionalGeneration

        model = load_checkpoint(T5ForConditionalGeneration, folder)
        t5 = cast(PretrainedT5, generator)
        for own, theirs in ((t5.encoder, model.encoder), (t5.decoder, model.decoder)):
            weights = theirs.state_dict()
            weights.pop("embed_tokens.weight", None)
            own.load_state_dict(weights)
        t5.table.load_rows(
            model.get_input_embeddings().weight,
            model.get_output_embeddings().weight,
            start=model.config.decoder_start_token_id,
            has_codes=self.checkpoint.num_codes > 0,
        )


class PretrainedT5(T5):
    """See the module docstring."""

    table: ExtendedTable
    before: Tensor
    after: Tensor

    def __init__(self, config: PretrainedT5Config, vocab: Vocab) -> None:
        # Not T5's: its stacks come from sizes, and these from a checkpoint.
        Generator.__init__(self)
        self.vocab = vocab
        self.objective = config.objective
        stack = config.stack_config()
        # A tied head reads states that are scaled down, which is a temperature.
        scale = stack.d_model**0.5 if config.is_tied() else 1.0
        self.table = config.token_table(vocab, temperature=scale)
        self.inputs = self.fed_inputs = None
        self.encoder, self.decoder = _stacks(config)
        self._has_end = config.end_token
        found = config.checkpoint
        self.register_buffer("before", self.table.text_ids(found.before), persistent=False)
        self.register_buffer("after", self.table.text_ids(found.after), persistent=False)
        self._end = found.end

    def num_targets(self, lengths: Tensor) -> int:
        """The codes of the last item of every row, and the end tokens where they are targets."""
        return int((lengths > 0).sum()) * (self.vocab.num_levels + self._has_end)

    def loss_sum(self, batch: TokenBatch) -> Tensor:
        """Cross-entropy summed over the target tokens of the batch."""
        counts = batch.lengths > 0
        codes, lengths = batch.codes, batch.lengths.clamp(min=1)
        targets = codes[torch.arange(len(codes), device=codes.device), lengths - 1]
        tokens, mask = surround(*self._histories(codes, lengths), self.before, self.after)
        start = torch.full_like(targets[:, :1], BOS)
        fed = torch.cat([start, self.vocab.tokens(targets)], dim=1)
        hidden = self.decoder(
            inputs_embeds=self.table(fed),
            encoder_hidden_states=self._states(tokens, mask),
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state[counts]
        loss = self.level_loss_sum(hidden[:, :-1], targets[counts])
        if not self._has_end:
            return loss
        smoothing = self.objective.label_smoothing
        return loss + self.table.text_loss_sum(hidden[:, -1], self._end, label_smoothing=smoothing)

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, T5State]:
        """See `Generator.prefill`."""
        return super().prefill(*surround(tokens, mask.bool(), self.before, self.after))

    def ask(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, T5State]:
        """`prefill` for questions [B, Q], padded on the left: nothing is put around them."""
        return super().prefill(tokens, mask)

    def script_loss_sum(self, scripts: ScriptBatch) -> Tensor:
        """See `Generator.script_loss_sum`."""
        questions, answers = scripts.questions, scripts.answers
        column = torch.arange(questions.shape[1], device=questions.device)
        mask = column < scripts.question_lengths.unsqueeze(1)
        hidden = self.decoder(
            inputs_embeds=self.table(shift_right(answers)),
            encoder_hidden_states=self._states(questions, mask),
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        is_target = scripts.is_target
        return self.table.answer_loss_sum(hidden[is_target], answers[is_target], self.objective)

    def _histories(self, codes: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """BOS and the codes of all items but each row's last: [B, 1 + (N - 1) * L], and a mask."""
        rows, items, levels = codes.shape
        body = self.vocab.tokens(codes[:, : items - 1]).reshape(rows, -1)
        column = torch.arange(body.shape[1], device=codes.device)
        is_code = column < (lengths.unsqueeze(1) - 1) * levels
        start = torch.full_like(lengths.unsqueeze(1), BOS)
        tokens = torch.cat([start, body.masked_fill(~is_code, PAD)], dim=1)
        return tokens, torch.cat([torch.ones_like(start, dtype=torch.bool), is_code], dim=1)

    def _states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(inputs_embeds=self.table(tokens), attention_mask=mask)
        return states.last_hidden_state


def _stacks(config: PretrainedT5Config) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder without their own embeddings."""
    from transformers.models.t5.modeling_t5 import T5Stack

    stacks = []
    for is_decoder in (False, True):
        stack_config = config.stack_config()
        stack_config.is_decoder = stack_config.use_cache = is_decoder
        stack_config.dropout_rate = config.dropout
        if is_decoder:
            stack_config.num_layers = stack_config.num_decoder_layers
        # The embeddings that the stack would draw are thrown away at once: let them be small.
        stack_config.vocab_size = 1
        stack = T5Stack(stack_config)
        stack.embed_tokens = nn.Identity()
        stacks.append(stack)
    return stacks[0], stacks[1]
