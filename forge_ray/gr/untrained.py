"""A small checkpoint without training: a tokenizer of a catalogue's own texts, and a size.

Models that read text take their tokenizer and their size from a folder of transformers. Where no
pretrained one is to be had, or a small one is wanted, this writes such a folder: byte-level BPE
learned on the items' texts, and the configuration of a Qwen2 or T5. It holds no weights; train with
`model.fresh=true`. A published checkpoint takes its place by its path alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError

logger = logging.getLogger(__name__)

_PAD, _END = "<pad>", "</s>"
_BYTES = 256
"""Tokens that any text can be spelled in."""


@dataclass(kw_only=True)
class UntrainedConfig:
    """What the folder describes."""

    columns: list[str] = field(default_factory=lambda: ["title"])
    """Columns of the items whose texts the tokenizer learns."""
    prompts: list[str] = field(
        default_factory=lambda: ["text: item: query:"],
    )
    """Texts that are learned with them: what prompts and templates say."""
    vocab_size: int = 2000
    """Most tokens, bytes and two marks included."""
    family: Literal["qwen2", "t5"] = "qwen2"
    """For `pretrained_decoder` or `pretrained_t5`."""
    hidden_size: int = 128
    """Width."""
    num_layers: int = 4
    """Blocks (of encoder and decoder each, for T5)."""
    num_heads: int = 4
    """Attention heads; must divide `hidden_size` into even widths."""
    intermediate_size: int = 256
    """Width of the feed-forward blocks."""

    def __post_init__(self) -> None:
        """Checks the sizes."""
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}. Raise it.")
        if self.vocab_size < _BYTES + 2:
            raise ConfigError(
                f"vocab_size must be >= {_BYTES + 2}, got {self.vocab_size}. Use e.g. 2000."
            )
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ConfigError(
                f"hidden_size must be an even multiple of num_heads={self.num_heads}, got "
                f"{self.hidden_size}. Set hidden_size={32 * self.num_heads}."
            )


@dataclass(frozen=True)
class UntrainedCheckpoint:
    """What was written.

    Attributes:
        folder: for `model.pretrained`.
        tokens: of the tokenizer.
        texts: that it was learned on.
    """

    folder: str
    tokens: int
    texts: int


def write_untrained(
    dataset: Dataset, folder: str | Path, config: UntrainedConfig
) -> UntrainedCheckpoint:
    """Learn a tokenizer and write it beside a configuration; equal calls write equal files.

    Memory: that of the texts.

    Args:
        dataset: its items have the texts.
        folder: new or empty.
        config: what it describes.

    Raises:
        ConfigError: there is no such column, or the folder is in use.
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"folder must be new or empty, got {target}. Choose another one.")
    columns = dataset.item_columns()
    unknown = [name for name in config.columns if name not in columns]
    if unknown or not config.columns:
        raise ConfigError(
            f"columns must be columns of the items of {dataset.name}, got {config.columns}. There "
            f"are {', '.join(columns)}."
        )
    texts = [*config.prompts, *_texts(dataset, config.columns)]
    tokenizer = _learned(texts, config.vocab_size)
    target.mkdir(parents=True, exist_ok=True)
    _saved(tokenizer).save_pretrained(target)
    _architecture(config, tokenizer.get_vocab_size()).save_pretrained(target)
    return UntrainedCheckpoint(str(target), tokenizer.get_vocab_size(), len(texts))


def _texts(dataset: Dataset, columns: list[str]) -> Iterator[str]:
    table = dataset.items(columns)
    for name in columns:
        for text in table[name].cast(pa.string()).to_pylist():
            if text:
                # Queries are in lower case, texts of items are not.
                yield text
                yield text.lower()


def _learned(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _saved(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_PAD, unk_token=None
    )


def _architecture(config: UntrainedConfig, vocab_size: int) -> Any:
    from transformers import Qwen2Config, T5Config

    if config.family == "t5":
        return T5Config(
            vocab_size=vocab_size,
            d_model=config.hidden_size,
            d_kv=config.hidden_size // config.num_heads,
            d_ff=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            # Version 1.1: a head of its own.
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
