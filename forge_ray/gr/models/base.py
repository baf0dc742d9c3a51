"""The interface of every generator, and the two parts that all of them share.

A generator scores the next code of a semantic ID given the tokens before it. It knows nothing about
items, files or how a search uses it. A config is the factory of its model:
`GeneratorConfig.build(vocab)`.

Shapes: B rows, N items of a row, L levels, S tokens, W beams, D width, K codes of a level, M
targets, V token ids.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_ray.config import Component
from forge_ray.data.examples import ExampleMode
from forge_ray.errors import ConfigError
from forge_ray.gr.models.code_tables import CodeTable, code_rows, token_rows
from forge_ray.gr.models.discrec import DiscRec
from forge_ray.gr.scripts import ScriptBatch
from forge_ray.gr.vocab import BOS, Vocab

Competitors: TypeAlias = Literal["level", "full"]
"""Which codes a target competes with: those of its own level, or all codes of all levels."""


@dataclass(frozen=True)
class Objective:
    """What a target is charged.

    Attributes:
        softmax: codes that compete.
        label_smoothing: share of a target's mass that is spread evenly over its competitors.
    """

    softmax: Competitors = "level"
    label_smoothing: float = 0.0


@dataclass(kw_only=True)
class GeneratorConfig(Component):
    """What every generator can be told; subclasses choose the architecture."""

    kind: str = ""
    dropout: float = 0.1
    """Share of activations dropped while training."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel of transformers."""
    softmax: Competitors = "level"
    """Codes that compete in the loss. `full` also charges mass on other levels' codes, which
    decoding never reads: it conditions on the level."""
    label_smoothing: float = 0.0
    """Share of a target's mass that is spread evenly over its competitors."""

    def __post_init__(self) -> None:
        """Checks the rules that no single field states."""
        for name in ("dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(
                    f"model.{name} must be in [0, 1), got {getattr(self, name)}. Use e.g. 0.1."
                )

    @property
    def examples(self) -> ExampleMode:
        """How sequences become training rows."""
        return "window"

    @property
    def packs(self) -> bool:
        """Whether training rows of any lengths share a pass without padding."""
        return False

    @property
    def reads_text(self) -> bool:
        """Whether rows of text can be learned and asked."""
        return False

    @property
    def objective(self) -> Objective:
        """What a target is charged."""
        return Objective(self.softmax, self.label_smoothing)

    def resolved(self) -> GeneratorConfig:
        """The config with all that it names read in, so that `build` needs no file."""
        return self

    def build(self, vocab: Vocab) -> Generator:
        """Creates the model with fresh weights, drawn from torch's global generator."""
        raise ConfigError("model.kind must name an architecture, got none. Set model.kind=decoder.")

    def start(self, vocab: Vocab) -> Generator:
        """Creates the model with the weights that training begins with: fresh ones, or others."""
        return self.build(vocab)

    def check_history(self, max_history: int) -> None:
        """Refuses histories longer than the model tells apart, before any training.

        No rule of the configuration itself: models that were trained so are still read.

        Args:
            max_history: items of a history that the model will read.

        Raises:
            ConfigError: the newest items would lose their order.
        """


def require_sizes(config: GeneratorConfig, *names: str) -> None:
    """Refuses sizes below 1.

    Raises:
        ConfigError: names the field.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"model.{name} must be >= 1, got {getattr(config, name)}. Raise it.")


@dataclass(kw_only=True)
class SizedConfig(GeneratorConfig):
    """Size of a generator that is trained from scratch.

    The defaults give about 0.8 M parameters, which trains 1,000 batches of 64 short histories in
    about two minutes on one CPU thread.
    """

    hidden_size: int = 128
    """Width D of the residual stream."""
    num_layers: int = 4
    """Transformer blocks (of the encoder and of the decoder each, where there are two)."""
    num_heads: int = 4
    """Attention heads; must divide `hidden_size`."""
    intermediate_size: int = 256
    """Width of the feed-forward blocks."""
    tie_embeddings: bool = False
    """Whether the output head reuses the input embeddings."""
    temperature: float = 1.0
    """Divides all logits, in the loss and in decoding alike; below 1 hard negatives weigh more.
    LETTER (arXiv 2405.07314) divides in the loss only; here beam scores stay the probabilities
    that the loss charged."""
    level_embeddings: bool = False
    """Whether a learned vector of its level is added to every token."""
    recency_embeddings: int = 0
    """Newest items of a history with a learned vector of their own, counted back from the target;
    older ones share the last. 0 adds none."""
    discrec: bool = False
    """Whether the codes of an item are read together before the stacks (`gr/models/discrec.py`)."""

    def __post_init__(self) -> None:
        """Checks the rules that no single field states."""
        super().__post_init__()
        require_sizes(self, "hidden_size", "num_layers", "num_heads", "intermediate_size")
        if self.temperature <= 0:
            raise ConfigError(f"model.temperature must be > 0, got {self.temperature}. Use e.g. 1.")
        if self.recency_embeddings < 0:
            raise ConfigError(
                f"model.recency_embeddings must be >= 0, got {self.recency_embeddings}. Use 0."
            )
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ConfigError(
                "model.hidden_size must be an even multiple of "
                f"model.num_heads={self.num_heads}, got {self.hidden_size}. "
                f"Set model.hidden_size={32 * self.num_heads}."
            )

    def input_module(self, vocab: Vocab) -> DiscRec | None:
        """Creates the module between embeddings and stack, if there is to be one."""
        if not self.discrec:
            return None
        return DiscRec(
            self.hidden_size,
            vocab.num_levels,
            inner=self.intermediate_size,
            dropout=self.dropout,
        )

    def token_table(self, vocab: Vocab) -> TokenTable:
        """Creates the embeddings and the head, with fresh weights."""
        return TokenTable(
            vocab,
            self.hidden_size,
            is_tied=self.tie_embeddings,
            temperature=self.temperature,
            has_levels=self.level_embeddings,
            num_recent=self.recency_embeddings,
        )


@dataclass(frozen=True)
class TokenBatch:
    """Training rows as codes.

    Attributes:
        codes: int64 [B, N, L], right padded with any valid code.
        lengths: int64 [B], items of each row; 0 is a row that counts for nothing.
        scripts: rows of text and codes beside them, for models that read text; None for a training
            on histories alone.
    """

    codes: Tensor
    lengths: Tensor
    scripts: ScriptBatch | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """The batch on another device."""
        return TokenBatch(
            self.codes.to(device, non_blocking=True),
            self.lengths.to(device, non_blocking=True),
            None if self.scripts is None else self.scripts.to(device),
        )


class TokenTable(nn.Module):
    """Input embeddings and output head in one module.

    Both are used through `forward`, because ZeRO-3 gathers a module's weights only around its own
    forward.

    Attributes:
        weight: [V, D] input embeddings, and the head when tied.
        head: [V - specials, D] output head, None when tied.
        levels: [L + 1, D] added to the tokens of each level (0 is all specials), or None.
        recent: [R + 1, D] added by recency, 0 being the item under generation, or None.
    """

    vocab: Vocab
    weight: nn.Parameter
    head: nn.Parameter | None
    levels: nn.Parameter | None
    recent: nn.Parameter | None

    def __init__(
        self,
        vocab: Vocab,
        width: int,
        *,
        is_tied: bool,
        temperature: float = 1.0,
        has_levels: bool = False,
        num_recent: int = 0,
    ) -> None:
        super().__init__()
        self.vocab = vocab
        self._temperature = temperature
        # transformers' 0.02 was measured to learn slower at width 128; as a head it keeps the
        # first predictions uniform, so a tied table stays small.
        scale = 0.02 if is_tied else width**-0.5
        self.weight = nn.Parameter(torch.randn(vocab.size, width) * scale)
        rows = vocab.size - vocab.num_special
        self.head = None if is_tied else nn.Parameter(torch.randn(rows, width) * 0.02)
        self.levels = nn.Parameter(torch.zeros(vocab.num_levels + 1, width)) if has_levels else None
        self.recent = nn.Parameter(torch.zeros(num_recent + 1, width)) if num_recent else None

    def forward(
        self,
        inputs: Tensor,
        level: int | None = None,
        *,
        recency: Tensor | None = None,
        competitors: Competitors = "level",
    ) -> Tensor:
        """Embeds tokens, or scores codes.

        Args:
            inputs: token ids int64 [...], or hidden states [..., D] when a level is given.
            level: level of the code to score.
            recency: int64 that broadcasts to the ids, items back from the one under generation;
                None is that item itself. Read only by a table with `recent`.
            competitors: which codes are scored.

        Returns:
            embeddings [..., D], or float32 logits [..., K_level] ([..., V - specials] for `full`).
        """
        if level is None:
            return self._embed(inputs, recency)
        codes = self.weight[self.vocab.num_special :] if self.head is None else self.head
        if competitors == "level":
            start = self.vocab.level_offsets[level]
            codes = codes[start : start + self.vocab.codebook_sizes[level]]
        return functional.linear(inputs, codes).float() / self._temperature

    def _embed(self, tokens: Tensor, recency: Tensor | None) -> Tensor:
        embedded = functional.embedding(tokens, self.weight)
        if self.levels is not None:
            embedded = embedded + functional.embedding(self.vocab.levels_of(tokens), self.levels)
        if self.recent is not None:
            place = torch.zeros_like(tokens) if recency is None else recency
            place = place.clamp(max=len(self.recent) - 1)
            embedded = embedded + functional.embedding(place, self.recent)
        return embedded


class Generator(nn.Module, ABC):
    """A model that generates semantic IDs code by code.

    By default every prediction is a softmax over the codes of *one* level: which level comes next
    is known, so the other levels' codes never compete, and the output matrix product shrinks by the
    number of levels.
    """

    vocab: Vocab
    table: TokenTable
    objective: Objective

    @abstractmethod
    def loss_sum(self, batch: TokenBatch) -> Tensor:
        """Cross-entropy summed over all target tokens, float32 scalar with gradient."""

    @abstractmethod
    def num_targets(self, lengths: Tensor) -> int:
        """Target tokens of rows with these lengths [B]."""

    @abstractmethod
    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Reads histories.

        Args:
            tokens: int64 [B, S], left padded, BOS first (`Vocab.history_tokens`).
            mask: bool [B, S], False on padding.

        Returns:
            float32 logits [B, K_0] of the first level, and the state for `step`.
        """

    @abstractmethod
    def step(self, state: Any, parents: Tensor, codes: Tensor, level: int) -> tuple[Tensor, Any]:
        """Extends every beam by one code.

        Args:
            state: from `prefill` or the previous `step`; consumed, do not use it again.
            parents: int64 [B, W], beam of the previous step that each beam extends (0 after
                `prefill`).
            codes: int64 [B, W], code chosen at `level - 1`.
            level: level to score, 1..L-1.

        Returns:
            float32 logits [B, W, K_level], and the next state.
        """

    def script_loss_sum(self, scripts: ScriptBatch) -> Tensor:
        """Cross-entropy summed over all answers; of models that read text.

        Raises:
            ConfigError: this one does not.
        """
        raise ConfigError(
            f"tasks must be next_item alone for {type(self).__name__}, which reads no text, got "
            "rows of text. Use a pretrained model."
        )

    def forward(self, batch: TokenBatch) -> Tensor:
        """`loss_sum`, and that of the scripts of a mixture; training engines wrap `forward`."""
        loss = self.loss_sum(batch)
        # Both parts always run: with ZeRO-3 a rank that left one out would keep others waiting.
        return loss if batch.scripts is None else loss + self.script_loss_sum(batch.scripts)

    def loss(self, batch: TokenBatch) -> Tensor:
        """Mean cross-entropy per target token; ln(codes of a level) before training."""
        return self.loss_sum(batch) / max(1, self.num_targets(batch.lengths))

    def recompute_activations(self) -> None:
        """Lets transformer blocks compute their activations again in the backward pass.

        Raises:
            ConfigError: no block of this model can.
        """
        stacks: list[Any] = [
            one for one in self.modules() if hasattr(one, "gradient_checkpointing_enable")
        ]
        if not stacks:
            raise ConfigError(
                f"engine.activation_checkpointing must be false for {type(self).__name__}, got "
                "true. It has no blocks of transformers: leave it out and lower "
                "engine.micro_batch."
            )
        with warnings.catch_warnings():
            # Renamed within transformers 5; every 5.x still has this name.
            warnings.simplefilter("ignore", FutureWarning)
            for stack in stacks:
                # Reentrant checkpoints lose gradients of arguments given by name.
                stack.gradient_checkpointing_enable({"use_reentrant": False})

    def code_tables(self) -> dict[str, CodeTable]:
        """Which rows of which parameters stand for codes, by the parameter's name."""
        tables = {"table.weight": token_rows(self.vocab)}
        if self.table.head is not None:
            tables["table.head"] = code_rows(self.vocab)
        return tables

    def compilable(self) -> list[nn.Module]:
        """The parts that repeat and cost most, none inside another; training may compile them."""
        # Imported here: transformers costs seconds, and configs are read by processes that train
        # nothing.
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [one for one in self.modules() if isinstance(one, GradientCheckpointingLayer)]

    def competing_logits(self, hidden_MD: Tensor, prefixes: Tensor, level: int) -> Tensor:
        """Scores the codes that compete in the loss of a level.

        Args:
            hidden_MD: state that predicts the code.
            prefixes: int64 [M, level], the codes before it.
            level: level of the code.

        Returns:
            float32 logits [M, K_level], of all codes [M, V - specials] with `softmax=full`.
        """
        return self.table(hidden_MD, level, competitors=self.objective.softmax)

    def level_loss_sum(self, hidden_MLD: Tensor, targets_ML: Tensor) -> Tensor:
        """Sum over levels of the cross-entropy that `objective` describes.

        Args:
            hidden_MLD: state that predicts each code of M items.
            targets_ML: the codes, int64.
        """
        is_full = self.objective.softmax == "full"
        offsets = self.vocab.level_offsets if is_full else (0,) * self.vocab.num_levels
        losses = [
            functional.cross_entropy(
                self.competing_logits(hidden_MLD[:, level], targets_ML[:, :level], level),
                targets_ML[:, level] + offsets[level],
                reduction="sum",
                label_smoothing=self.objective.label_smoothing,
            )
            for level in range(self.vocab.num_levels)
        ]
        return torch.stack(losses).sum()


@dataclass(frozen=True)
class BeamTree:
    """Which fed code belongs to which beam, so that one KV cache serves all beams.

    The cache holds each history once, followed by the codes of every beam of every step. A beam
    sees the history and its own ancestors; nothing is copied or reordered when beams are dropped or
    forked.

    Attributes:
        ancestors: int64 [B, W, depth], for each live beam the beam index at each step so far.
        widths: beams fed at each step so far, length `depth`.
    """

    ancestors: Tensor
    widths: tuple[int, ...] = ()

    @classmethod
    def root(cls, batch_size: int, device: torch.device) -> BeamTree:
        """The tree before any code: one beam per row."""
        return cls(torch.zeros(batch_size, 1, 0, dtype=torch.int64, device=device))

    def extend(self, parents: Tensor) -> BeamTree:
        """The tree after feeding one code to each of W beams with these parents [B, W]."""
        rows, width = parents.shape
        depth = len(self.widths)
        index = parents.clamp(min=0).unsqueeze(-1).expand(rows, width, depth)
        own = torch.arange(width, device=parents.device).expand(rows, width).unsqueeze(-1)
        return BeamTree(
            torch.cat([self.ancestors.gather(1, index), own], dim=2), (*self.widths, width)
        )

    def visible(self) -> Tensor:
        """Which fed codes each beam may attend to: bool [B, W, sum(widths)]."""
        rows, width, _ = self.ancestors.shape
        device = self.ancestors.device
        starts = torch.tensor([0, *self.widths[:-1]], device=device).cumsum(0)
        visible = torch.zeros(rows, width, sum(self.widths), dtype=torch.bool, device=device)
        return visible.scatter_(2, self.ancestors + starts, True)

    def depths(self) -> Tensor:
        """int64 [sum(widths)]: the step at which each cached code was fed, from 0."""
        device = self.ancestors.device
        steps = torch.arange(len(self.widths), device=device)
        return steps.repeat_interleave(torch.tensor(self.widths, device=device))


def items_back(lengths: Tensor, num_tokens: int, num_levels: int) -> Tensor:
    """Items between a token's item and its row's last one, int64 [B, S]; BOS is an item of its own.

    Args:
        lengths: int64 [B], items of each row; the last one is the target.
        num_tokens: S, BOS first, padded on the right.
        num_levels: tokens of an item.
    """
    column = torch.arange(num_tokens, device=lengths.device)
    item = (column - 1).div(num_levels, rounding_mode="floor")
    return (lengths.unsqueeze(1) - 1 - item).clamp(min=0)


def shift_right(tokens: Tensor) -> Tensor:
    """BOS, then all tokens but the last: [B, S] to [B, S]."""
    bos = torch.full_like(tokens[:, :1], BOS)
    return torch.cat([bos, tokens[:, :-1]], dim=1)
