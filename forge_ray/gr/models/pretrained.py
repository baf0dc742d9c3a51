"""Checkpoints of transformers as generators: found, described, extended by codes, loaded.

The vocabulary is the generator's own (specials, then codes) followed by the checkpoint's text
vocabulary. What the checkpoint decides is read once, by `PretrainedConfig.resolved`, and kept in
the configuration; a published model therefore decodes without the checkpoint. Knows files of
checkpoints; knows nothing about losses or decoding.

Shapes: D width, V own token ids, T text token ids.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_ray.embed.encoders.model import find_model
from forge_ray.errors import ConfigError
from forge_ray.gr.models.base import Generator, GeneratorConfig, Objective, TokenTable
from forge_ray.gr.models.prompt import PromptConfig, PromptTokens, tokenize_prompt
from forge_ray.gr.scripts import TaskText, make_task_text
from forge_ray.gr.tasks import TasksConfig
from forge_ray.gr.vocab import BOS, Vocab

_NEEDLESS = ("_name_or_path", "architectures", "dtype", "id2label", "label2id")
"""Entries of a checkpoint's configuration that say where it came from, not what it is."""
_SPREAD = 1e-9
"""Variance of new rows beside that of the text rows, as transformers takes it when it resizes."""

Pretrained = TypeVar("Pretrained", bound="PretrainedConfig")


@dataclass(kw_only=True)
class Checkpoint:
    """What was read from a checkpoint; filled by `PretrainedConfig.resolved`, not by hand."""

    fingerprint: str = ""
    """Commit on the hub, or hash of the folder's files."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """transformers' configuration."""
    before: list[int] = field(default_factory=list)
    """Text tokens before a history."""
    after: list[int] = field(default_factory=list)
    """Text tokens after a history."""
    end: int = -1
    """Text token that ends an answer."""
    num_text: int = 0
    """Rows of the checkpoint's embeddings that are text."""
    num_codes: int = 0
    """Rows after them that are codes, in a checkpoint that was trained on SIDs before."""


@dataclass(kw_only=True)
class PretrainedConfig(GeneratorConfig):
    """A checkpoint of transformers, its vocabulary extended by codes; it decides the size."""

    pretrained: str = ""
    """Folder that `save_pretrained` wrote (weights, configuration, tokenizer), on every node, or a
    name on the hub."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty for its default."""
    fresh: bool = False
    """Whether weights are drawn anew, to measure what pretraining is worth."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Text around the codes of a history."""
    end_token: bool = False
    """Whether the token after the codes is a target too, as in FORGE; needs `softmax=full`."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Read from `pretrained`; not set by hand."""

    def __post_init__(self) -> None:
        """Checks the rules across fields."""
        super().__post_init__()
        if self.end_token and self.softmax != "full":
            raise ConfigError(
                "model.end_token must be false with model.softmax=level, got true. Only where all "
                "tokens compete is there anything to learn about the end: set model.softmax=full."
            )

    @property
    def reads_text(self) -> bool:
        """See `GeneratorConfig.reads_text`."""
        return True

    @property
    @abstractmethod
    def families(self) -> tuple[str, ...]:
        """Transformers' `model_type` of the checkpoints that fit."""

    @abstractmethod
    def is_tied(self) -> bool:
        """Whether the checkpoint's output head is its input embedding."""

    @abstractmethod
    def load(self, generator: Generator, folder: Path) -> None:
        """Copies a checkpoint's weights into a generator of this configuration."""

    def prompt_tokens(self, tokenizer: Any) -> PromptTokens:
        """The prompt as this architecture wants it."""
        return tokenize_prompt(self.prompt, tokenizer)

    @abstractmethod
    def question_sides(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Entries of a script before and after every question, as this architecture wants them."""

    def task_text(self, tasks: TasksConfig) -> TaskText:
        """What turns texts into scripts of these tasks, by the checkpoint's tokenizer.

        Raises:
            ConfigError: the tokenizer is none of the library `tokenizers`.
        """
        folder = find_model(self.pretrained, revision=self.revision)
        tokenizer = _tokenizer(folder.path)
        if not tokenizer.is_fast:
            raise ConfigError(
                "model.pretrained must have a tokenizer.json for tasks with text, got "
                f"{type(tokenizer).__name__} in {folder.path}. Save a fast tokenizer there."
            )
        head, tail = self.question_sides(tokenizer)
        return make_task_text(
            tasks,
            tokenizer=tokenizer.backend_tokenizer.to_str(),
            tokenize=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            head=head,
            tail=tail,
            end=self.checkpoint.end,
            closes=self.end_token,
        )

    def resolved(self: Pretrained) -> Pretrained:
        """The config with the checkpoint's own configuration and the prompt's tokens in it.

        Raises:
            ConfigError: there is no such checkpoint, or it is of another architecture.
        """
        if not self.pretrained:
            raise ConfigError(
                "model.pretrained must name a checkpoint, got none. Set it to a folder that "
                "save_pretrained wrote, or to a name on the hub."
            )
        folder = find_model(self.pretrained, revision=self.revision)
        architecture = self._architecture(folder.path)
        tokenizer = _tokenizer(folder.path)
        tokens = self.prompt_tokens(tokenizer)
        num_text, num_codes = _split_rows(tokenizer, int(architecture["vocab_size"]))
        found = Checkpoint(
            fingerprint=folder.fingerprint,
            architecture=architecture,
            before=tokens.before,
            after=tokens.after,
            end=self._end(tokenizer),
            num_text=num_text,
            num_codes=num_codes,
        )
        return replace(self, pretrained=folder.source, revision=folder.revision, checkpoint=found)

    def start(self, vocab: Vocab) -> Generator:
        """Creates the model with the checkpoint's weights.

        Codes that the checkpoint does not know begin at the mean of the text rows.

        Raises:
            ConfigError: on this node the checkpoint is another one, its weights do not load, or it
                knows fewer codes than there are.
        """
        known, codes = self.checkpoint.num_codes, vocab.size - vocab.num_special
        if 0 < known < codes:
            raise ConfigError(
                f"model.pretrained must know {codes} code tokens or none, got {known} in "
                f"{self.pretrained}. Use the SID table that it was trained with."
            )
        generator = self.build(vocab)
        if self.fresh:
            return generator
        folder = find_model(self.pretrained, revision=self.revision)
        if folder.fingerprint != self.checkpoint.fingerprint:
            raise ConfigError(
                f"{self.pretrained} must be the same checkpoint on every node, got "
                f"{folder.fingerprint[:12]} where {self.checkpoint.fingerprint[:12]} was meant. "
                "Copy the folder anew."
            )
        with torch.no_grad():
            self.load(generator, folder.path)
        return generator

    def stack_config(self) -> Any:
        """Transformers' configuration object."""
        from transformers import AutoConfig

        if not self.checkpoint.architecture:
            raise ConfigError(
                "model.checkpoint must be filled before a model is built, got nothing. Call "
                "`resolved()` on the configuration."
            )
        config = AutoConfig.for_model(**self.checkpoint.architecture)
        config._attn_implementation = self.attention
        return config

    def token_table(self, vocab: Vocab, *, temperature: float = 1.0) -> ExtendedTable:
        """Creates embeddings and head with fresh weights."""
        stack = self.stack_config()
        return ExtendedTable(
            vocab,
            int(stack.hidden_size),
            num_text=self.checkpoint.num_text,
            is_tied=self.is_tied(),
            temperature=temperature,
        )

    def _architecture(self, folder: Path) -> dict[str, Any]:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise _unusable(folder, error) from error
        if config.model_type not in self.families:
            raise ConfigError(
                f"model.pretrained must be of type {' or '.join(self.families)} for "
                f"model.kind={self.kind}, got {config.model_type} in {folder}. Use another "
                "checkpoint or another model.kind."
            )
        return {name: one for name, one in config.to_dict().items() if name not in _NEEDLESS}

    def _end(self, tokenizer: Any) -> int:
        if tokenizer.eos_token_id is not None:
            return int(tokenizer.eos_token_id)
        if self.end_token:
            raise ConfigError(
                "model.end_token must be false for a tokenizer without an end token, got true. "
                "Leave it out."
            )
        return -1


class ExtendedTable(TokenTable):
    """Embeddings and head of codes, followed by those of a text vocabulary.

    Text token t has the id V + t. Among `full` competitors it stands after all codes.

    Attributes:
        weight: [V + T, D].
        head: [V - specials + T, D], None when tied.
    """

    def __init__(
        self, vocab: Vocab, width: int, *, num_text: int, is_tied: bool, temperature: float
    ) -> None:
        super().__init__(vocab, width, is_tied=is_tied, temperature=temperature)
        self.num_text = num_text
        for name in ("weight", "head"):
            own = getattr(self, name)
            if own is not None:
                text = torch.randn(num_text, width) * 0.02
                setattr(self, name, nn.Parameter(torch.cat([own.detach(), text])))

    def text_ids(self, tokens: list[int]) -> Tensor:
        """Ids of text tokens, int64."""
        return torch.tensor(tokens, dtype=torch.int64) + self.vocab.size

    def text_loss_sum(self, hidden: Tensor, token: int, *, label_smoothing: float) -> Tensor:
        """Cross-entropy of one text token among all tokens, summed over states [M, D]."""
        logits = self(hidden, 0, competitors="full")
        place = self.vocab.size - self.vocab.num_special + token
        targets = torch.full_like(logits[:, 0], place, dtype=torch.int64)
        return functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=label_smoothing
        )

    def answer_loss_sum(self, hidden: Tensor, tokens: Tensor, objective: Objective) -> Tensor:
        """Cross-entropy of the tokens of answers, summed.

        With `softmax=level` a code competes with its level and a text token with all text: which of
        them comes next is known. With `full` all compete.

        Args:
            hidden: [M, D], states that predict them.
            tokens: int64 [M], ids of codes or text.
            objective: competitors and label smoothing.
        """
        vocab, smoothing = self.vocab, objective.label_smoothing
        if objective.softmax == "full":
            logits = self(hidden, 0, competitors="full")
            return functional.cross_entropy(
                logits, tokens - vocab.num_special, reduction="sum", label_smoothing=smoothing
            )
        num_codes = vocab.size - vocab.num_special
        groups = torch.where(tokens < vocab.size, vocab.levels_of(tokens), 0)
        losses = []
        for group in range(vocab.num_levels + 1):
            is_here = groups == group
            if group:
                first = vocab.num_special + vocab.level_offsets[group - 1]
                logits = self(hidden[is_here], group - 1)
            else:
                first = vocab.size
                logits = self(hidden[is_here], 0, competitors="full")[:, num_codes:]
            losses.append(
                functional.cross_entropy(
                    logits, tokens[is_here] - first, reduction="sum", label_smoothing=smoothing
                )
            )
        return torch.stack(losses).sum()

    def load_rows(
        self, embedding: Tensor, head: Tensor, *, start: int | None, has_codes: bool
    ) -> None:
        """Takes over a checkpoint's rows; new rows become the mean of its text rows.

        Source: mean resizing as in transformers' `resize_token_embeddings`; we differ in a diagonal
        covariance.

        Args:
            embedding: [T or more, D] input embeddings: text, then codes where it knows any.
            head: the same of the output head; not read when tied.
            start: text token that BOS continues, if there is one.
            has_codes: whether codes follow the text.
        """
        for own, given in ((self.weight, embedding), (self.head, head)):
            if own is None:
                continue
            text = given[: self.num_text].float()
            new = len(own) - len(text)
            spread = text.std(dim=0) * _SPREAD**0.5
            own[:new] = text.mean(dim=0) + torch.randn(new, text.shape[1]) * spread
            own[new:] = text
            if has_codes:
                num_codes = self.vocab.size - self.vocab.num_special
                own[new - num_codes : new] = given[self.num_text : self.num_text + num_codes]
        if start is not None:
            self.weight[BOS] = embedding[start]


def _split_rows(tokenizer: Any, vocab_size: int) -> tuple[int, int]:
    """How many embedding rows are text, and how many after them are the codes C0, C1, ….

    Source: FORGE (arXiv 2509.20904) adds its codes to the tokenizer under these names.
    """
    added = tokenizer.get_added_vocab()
    first = added.get("C0")
    if first is None:
        return vocab_size, 0
    num_codes = 0
    while added.get(f"C{num_codes}") == first + num_codes:
        num_codes += 1
    return int(first), num_codes


def load_checkpoint(kind: Any, folder: Path) -> Any:
    """A model of transformers in float32.

    Args:
        kind: an auto class, e.g. `AutoModelForCausalLM`.
        folder: of the checkpoint.

    Raises:
        ConfigError: the weights are absent or do not fit.
    """
    from safetensors import SafetensorError

    try:
        return kind.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unusable(folder, error) from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0]
    return ConfigError(
        f"model.pretrained must be a checkpoint with a tokenizer that transformers loads, got "
        f"{folder}: {reason} Use the folder that save_pretrained wrote."
    )
