"""Text encoders: sentence-transformers folders, plain encoders, the text tower of a CLIP.

Runs on transformers alone and reads the pooling from a sentence-transformers folder, so its models
give the vectors that sentence-transformers gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from forge_ray.embed.encoders.base import (
    EMPTY,
    Encoded,
    Encoder,
    EncoderConfig,
    FloatArray,
    autocast,
    finish,
)
from forge_ray.embed.encoders.model import ModelFolder, read_json
from forge_ray.errors import ConfigError

_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


@dataclass(kw_only=True)
class TextConfig(EncoderConfig):
    """Vectors of the items' texts."""

    kind: Literal["text"] = "text"
    columns: list[str] = field(default_factory=lambda: ["title"])
    """Columns joined to the text of an item, empty ones left out: text, numbers or lists of text.
    """
    separator: str = ". "
    """Stands between columns."""
    prefix: str = ""
    """Stands before every text, e.g. `passage: ` for E5."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """Which tokens' states make the vector; auto asks the folder, and takes the mean otherwise."""
    max_tokens: int = 0
    """Tokens read of a text; 0 for the model's own limit."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.max_tokens < 0:
            raise ConfigError(f"max_tokens must be >= 0, got {self.max_tokens}. Use 0 for all.")

    @property
    def wanted(self) -> str:
        """What a row must hold."""
        return "text"

    def load(self, model: ModelFolder) -> TextEncoder:
        """Load tokenizer and model; see `EncoderConfig.load`."""
        return TextEncoder(self, model.path)

    def is_empty(self, items: pa.Table) -> npt.NDArray[np.bool_]:
        """Tell which rows hold no text."""
        texts = join_columns(items, self.columns, self.separator)
        return np.asarray(pc.equal(pc.utf8_length(texts), 0).to_numpy(zero_copy_only=False))


class TextEncoder(Encoder):
    """A tokenizer and a transformer."""

    def __init__(self, config: TextConfig, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._config = config
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"model must be a text encoder that transformers loads, got {folder}: {reason} "
                "Use another model."
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._max_tokens = config.max_tokens or _token_limit(folder, model, self._tokenizer)
        # A model of two towers brings its own way from a text to a vector.
        self._has_towers = hasattr(model, "get_text_features")
        self._pooling = _pooling(config, folder, has_towers=self._has_towers)
        is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
        self._model = (model.get_encoder() if is_pair else model).eval().to(config.device)
        self.dim = self._embed(["a"]).shape[1]

    def encode(self, items: pa.Table) -> Encoded:
        """Encode every row; texts of about equal length share a batch. See `Encoder.encode`."""
        config = self._config
        texts = np.asarray(join_columns(items, config.columns, config.separator).to_pylist())
        lengths = np.char.str_len(texts) if len(texts) else np.zeros(0, dtype=np.int64)
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        for start in range(0, len(order), config.batch_size):
            rows = order[start : start + config.batch_size]
            out[rows] = self._embed([config.prefix + text for text in texts[rows].tolist()])
        return Encoded(out, dict.fromkeys(np.flatnonzero(lengths == 0).tolist(), EMPTY))

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> FloatArray:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._config.device)
        with autocast(self._config.device, self._config.precision):
            vectors = self._vectors(tokens)
        return finish(vectors, normalize=self._config.normalize)

    def _vectors(self, tokens: Any) -> torch.Tensor:
        if self._has_towers:
            found = self._model.get_text_features(**tokens)
            return found if isinstance(found, torch.Tensor) else found.pooler_output
        states = self._model(**tokens).last_hidden_state
        return pool(states.float(), tokens["attention_mask"], self._pooling)


def pool(states: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """Make one vector of the states of a text's tokens.

    Args:
        states: float [B, T, D].
        mask: int [B, T], 1 for true tokens; filling may stand on either side.
        how: `mean` of the true tokens, the first (`cls`) or the `last` of them.

    Returns:
        float [B, D].
    """
    if how == "mean":
        weight = mask[:, :, None].to(states.dtype)
        return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    rows = torch.arange(len(mask), device=mask.device)
    if how == "cls":
        return states[rows, mask.argmax(dim=1)]
    return states[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]


def join_columns(items: pa.Table, columns: list[str], separator: str) -> pa.Array:
    """Join the columns of each row to one text.

    Args:
        items: n rows.
        columns: names of text, number or list columns.
        separator: stands between columns that are not empty.

    Returns:
        string [n], trimmed, without nulls.
    """
    first, *others = (_as_text(items[column].combine_chunks()) for column in columns)
    for text in others:
        # Not with `null_handling="skip"`: pyarrow 26 loses rows in which nothing stands.
        both = pc.binary_join_element_wise(first, text, separator)
        lonely = pc.if_else(pc.equal(text, ""), first, both)
        first = pc.if_else(pc.equal(first, ""), text, lonely)
    return first


def _as_text(column: pa.Array) -> pa.Array:
    """A column as trimmed text, empty where nothing stands."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.binary_join(pc.cast(column, pa.list_(pa.string())), " ")
    elif pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise ConfigError(
            f"columns must hold text, numbers or lists of text, got {column.type}. Name others."
        )
    return pc.fill_null(pc.utf8_trim_whitespace(pc.cast(column, pa.string())), "")


def _token_limit(folder: Path, model: Any, tokenizer: Any) -> int:
    """The least of what the folder, the positions and the tokenizer allow."""
    limits = [(read_json(folder, "sentence_bert_config.json") or {}).get("max_seq_length")]
    config = getattr(model.config, "text_config", model.config)
    limits += [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    return int(min(limit for limit in limits if limit))


def _pooling(config: TextConfig, folder: Path, *, has_towers: bool) -> str:
    modules = read_json(folder, "modules.json") or []
    unknown = [m["type"] for m in modules if m["type"].rpartition(".")[2] not in _KNOWN_MODULES]
    if unknown:
        raise ConfigError(
            f"model must be of the parts {', '.join(_KNOWN_MODULES)}, got {unknown[0]} in {folder}."
            " Use another model."
        )
    if config.pooling != "auto":
        if has_towers:
            raise ConfigError(
                f"pooling must be auto for a model with a text tower, got {config.pooling!r}."
            )
        return config.pooling
    settings = read_json(folder, "1_Pooling", "config.json") or {"pooling_mode_mean_tokens": True}
    asked = [name for name, value in settings.items() if value is True and "pooling_mode" in name]
    if len(asked) != 1 or asked[0] not in _POOLINGS:
        raise ConfigError(
            f"pooling must be one of mean, cls, last, got {asked} in {folder}. Set pooling=mean."
        )
    return _POOLINGS[asked[0]]
