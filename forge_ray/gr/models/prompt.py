"""Text around a history: how a pretrained model is told what the codes are.

A prompt is fixed text before and after the codes of a history, as tokens of the checkpoint's own
tokenizer. Knows tokenizers and token rows; knows nothing about models or losses.

Source: FORGE (arXiv 2509.20904), rows of the AL-GR data set: `system` is one constant instruction,
`user` is a constant prefix, all codes without a separator and a constant suffix.

Shapes: B rows, S tokens of a history, P and Q tokens of the prompt before and after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forge_ray.errors import ConfigError
from forge_ray.gr.vocab import PAD

_PLACE = "\ue000"
"""Stands for the history while a chat template is rendered; private use, in no real text."""


@dataclass(kw_only=True)
class PromptConfig:
    """Text around the codes of a history; all empty for codes alone."""

    system: str = ""
    """The chat's system message; needs `chat`."""
    before: str = ""
    """Stands before the codes."""
    after: str = ""
    """Stands after them."""
    chat: bool = False
    """Whether `before`, codes and `after` are a user's message in the tokenizer's chat template."""

    def __post_init__(self) -> None:
        """Checks that no text is dropped."""
        if self.system and not self.chat:
            raise ConfigError(
                "model.prompt.system must be empty without model.prompt.chat, got "
                f"{self.system[:30]!r}. Set model.prompt.chat=true or move it to "
                "model.prompt.before."
            )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but codes."""
        return not (self.before or self.after or self.chat)


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of the tokenizer before and after a history."""

    before: list[int]
    after: list[int]


def tokenize_prompt(config: PromptConfig, tokenizer: Any) -> PromptTokens:
    """A prompt as token ids.

    The two sides are tokenized apart, as a tokenizer does that splits its input at added tokens.

    Args:
        config: the text.
        tokenizer: of transformers.

    Raises:
        ConfigError: the tokenizer has no chat template, or its template drops the user's message.
    """
    before, after = _rendered(config, tokenizer) if config.chat else (config.before, config.after)
    sides = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
    return PromptTokens(*([int(token) for token in side] for side in sides))


def _rendered(config: PromptConfig, tokenizer: Any) -> tuple[str, str]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "model.prompt.chat must be false for a tokenizer without a chat template, got true. "
            "Use an instruction-tuned checkpoint, or write the template into before and after."
        )
    system = [{"role": "system", "content": config.system}] if config.system else []
    user = {"role": "user", "content": f"{config.before}{_PLACE}{config.after}"}
    text = tokenizer.apply_chat_template(
        [*system, user], tokenize=False, add_generation_prompt=True
    )
    before, found, after = str(text).partition(_PLACE)
    if not found:
        raise ConfigError(
            "model.prompt.chat must be false for a chat template that drops the user's message, "
            "got true. Use before and after."
        )
    return before, after


def surround(tokens: Tensor, mask: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Token rows with the prompt in the place of BOS and after the last code.

    Args:
        tokens: int64 [B, S], each row BOS and codes in one piece, padded on either side.
        mask: bool [B, S], False on padding.
        before: int64 [P]; where it is empty a row begins with its first code.
        after: int64 [Q].

    Returns:
        tokens int64 [B, P + S - 1 + Q], padded on the left, and their mask.
    """
    rows, width = tokens.shape[0], tokens.shape[1] - 1
    lengths = mask.sum(dim=1, keepdim=True) - 1
    column = torch.arange(width, device=tokens.device)
    # Codes move to the right end; where there are fewer, the gather reads what is masked anyway.
    start = mask.int().argmax(dim=1, keepdim=True) + 1
    source = (start + column - (width - lengths)).clamp(0, tokens.shape[1] - 1)
    body = tokens.gather(1, source).masked_fill(column < width - lengths, PAD)
    blank = torch.full((rows, len(before)), PAD, device=tokens.device)
    joined = torch.cat([blank, body, after.expand(rows, -1)], dim=1)
    place = width - lengths + torch.arange(len(before), device=tokens.device)
    joined = joined.scatter(1, place, before.expand(rows, -1))
    return joined, torch.arange(joined.shape[1], device=tokens.device) >= width - lengths
