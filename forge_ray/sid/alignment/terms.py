"""One contrastive term: two tensors of a batch, a similarity, a temperature and negatives.

Every alignment loss but two is a weighted list of these. B rows of this worker, C = world·B columns
of all workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from forge_ray.errors import ConfigError
from forge_ray.sid.alignment.batch import IDENTITY, INTERACTIONS
from forge_ray.sid.alignment.sides import End, Sides, off_diagonal

USER_TENSORS = ("user_z", "user_z_q", "user_teacher")
TEACHER_TENSORS = ("teacher", "user_teacher")
TENSORS = ("x", "z", "z_q", "x_hat", "middle", "teacher", *USER_TENSORS)


@dataclass(kw_only=True)
class TermConfig:
    """InfoNCE of an anchor with its positive against the other positives of the batch."""

    anchor: str = "z_q"
    """Tensor that looks for its partner: `x` (input), `z` (latent), `z_q` (sum of codewords),
    `x_hat` (decoder output), `middle` (decoder's first hidden layer), `teacher`; of users `user_z`,
    `user_z_q`, `user_teacher`."""
    positive: str = "z_q"
    """Tensor among which the partner is, one of the same names."""
    source: str = "co_occurrence"
    """Pairs that the term reads: `identity` (items of the reconstruction steps), `interactions`
    (needed by user tensors), or an item-to-item source such as `co_occurrence`."""
    teacher: str = "teacher"
    """Name of the teacher where an end is one."""
    pairing: Literal["pair", "own"] = "pair"
    """`pair`: the positive belongs to the related item (or user); `own`: to the anchor itself."""
    ends: Literal["one", "both"] = "one"
    """`both`: the related item is anchor as well, and the two losses are averaged."""
    symmetric: bool = False
    """Average with the reverse search: the positive looks for its anchor."""
    similarity: Literal["cos", "dot", "half_cos"] = "cos"
    """`half_cos`: a unit anchor with the positive as it is (FORGE, on raw inputs)."""
    temperature: float = 0.07
    """Similarities are divided by it; 1 for none."""
    learn_temperature: bool = False
    """Train the temperature from the value given."""
    max_scale: float | None = None
    """Bound of 1/temperature while it is learned."""
    mask: Literal["none", "same", "known"] = "same"
    """Negatives left out: `same`, those that share an item or user with the pair; `known`, also
    items that are related to the anchor anywhere in the train part."""
    projector: Literal["none", "linear", "mlp"] = "none"
    """Layer from the anchor to the positive's width; where both ends are the same tensor, both pass
    it."""
    weight: float = 1.0
    """Factor of the loss at the start."""
    final_weight: float | None = None
    """Factor at the end, linear in between; null keeps `weight`."""
    start: float = 0.0
    """Share of the training before which the term is off."""

    def __post_init__(self) -> None:
        """Check names, ranges and combinations."""
        for end in ("anchor", "positive"):
            if getattr(self, end) not in TENSORS:
                raise ConfigError(
                    f"alignment term {end} must be one of {', '.join(TENSORS)}, got "
                    f"{getattr(self, end)!r}. Use one of them."
                )
        self._check_ranges()
        self._check_combination()

    @property
    def tensors(self) -> tuple[str, str]:
        """Names of the two ends."""
        return self.anchor, self.positive

    @property
    def has_users(self) -> bool:
        """Whether an end belongs to a user."""
        return bool({*self.tensors} & {*USER_TENSORS})

    @property
    def has_teacher(self) -> bool:
        """Whether an end is a teacher's vector."""
        return bool({*self.tensors} & {*TEACHER_TENSORS})

    def key(self, tensor: str) -> str:
        """Name of a tensor in a batch, where there may be several teachers."""
        return f"{tensor}.{self.teacher}" if tensor in TEACHER_TENSORS else tensor

    def weight_at(self, progress: float) -> float:
        """Give the factor of the loss when the share `progress` of the steps is done."""
        if progress < self.start:
            return 0.0
        final = self.weight if self.final_weight is None else self.final_weight
        done = (progress - self.start) / (1 - self.start)
        return self.weight + (final - self.weight) * done

    def _check_ranges(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(
                f"alignment temperature must be > 0, got {self.temperature}. Use 1 for none."
            )
        if self.max_scale is not None and self.max_scale <= 0:
            raise ConfigError(
                f"alignment max_scale must be > 0, got {self.max_scale}. Use null for no bound."
            )
        if not 0 <= self.start < 1:
            raise ConfigError(f"alignment start must be in [0, 1), got {self.start}. Lower it.")
        if min(self.weight, self.final_weight or 0) < 0:
            raise ConfigError(
                f"alignment weights must be >= 0, got {self.weight} and {self.final_weight}. "
                "Use 0 to leave a term out."
            )

    def _check_combination(self) -> None:
        if self.has_users and self.source != INTERACTIONS:
            raise ConfigError(
                f"alignment term with {' and '.join(self.tensors)} must read users, got source "
                f"{self.source!r}. Set source to {INTERACTIONS}."
            )
        if self.has_teacher and (self.pairing, self.ends) != ("own", "one"):
            raise ConfigError(
                "alignment term with a teacher must have pairing own and ends one, got "
                f"{self.pairing} and {self.ends}. A teacher stands beside anchors only."
            )
        if self.mask == "known" and self.has_users:
            raise ConfigError(
                "alignment mask must be none or same where an end is a user, got 'known'. "
                "Known pairs are pairs of items."
            )
        if self.pairing == "own" and self.anchor == self.positive and self.projector == "none":
            raise ConfigError(
                f"alignment term of pairing own must have two tensors, got {self.anchor!r} twice. "
                "Change one end, or set pairing to pair."
            )
        if self.source == IDENTITY and (self.pairing, self.ends) != ("own", "one"):
            raise ConfigError(
                "alignment term of source identity must have pairing own and ends one, got "
                f"{self.pairing} and {self.ends}. An item has no partner but itself there."
            )


class Term(nn.Module):
    """A term's parameters, the temperature and the projector, and its loss."""

    config: TermConfig
    log_scale: nn.Parameter | None
    """Logarithm of the inverse temperature, scalar, when it is learned."""
    projector: nn.Module | None

    def __init__(self, name: str, config: TermConfig, widths: tuple[int, int]) -> None:
        """Set up a term.

        Args:
            name: of the term, for messages.
            config: what the term compares.
            widths: columns of anchor and positive.

        Raises:
            ConfigError: when the widths differ and there is no projector.
        """
        super().__init__()
        self.config = config
        if config.projector == "none" and widths[0] != widths[1]:
            raise ConfigError(
                f"alignment term {name} must compare tensors of one width, got {config.anchor} of "
                f"{widths[0]} and {config.positive} of {widths[1]}. Make the widths equal, or set "
                "its projector to linear or mlp."
            )
        self.projector = _projector(config.projector, *widths)
        start = torch.tensor(math.log(1 / config.temperature))
        self.log_scale = nn.Parameter(start) if config.learn_temperature else None

    @property
    def scale(self) -> torch.Tensor | float:
        """1/temperature."""
        if self.log_scale is None:
            return 1 / self.config.temperature
        return self.log_scale.exp().clamp(max=self.config.max_scale or math.inf)

    def reads(self, source: str) -> bool:
        """Whether the term is computed on batches of a source."""
        return self.config.source == source

    def forward(self, sides: Sides) -> torch.Tensor:
        """Compute the unweighted loss.

        Args:
            sides: tensors of both ends, B rows.

        Returns:
            Scalar, mean over this worker's rows; its mean over workers is the loss of the
            concatenated batch.
        """
        orders = ((0, 1), (1, 0)) if self.config.ends == "both" else ((0, 1),)
        losses = [self._directed(sides, first, second) for first, second in orders]
        return torch.stack(losses).mean()

    def _directed(self, sides: Sides, first: int, second: int) -> torch.Tensor:
        config = self.config
        anchor = End(first, config.key(config.anchor), config.similarity != "dot")
        at = first if config.pairing == "own" else second
        positive = End(at, config.key(config.positive), config.similarity == "cos")
        loss = self._search(sides, anchor, positive)
        return (loss + self._search(sides, positive, anchor)) / 2 if config.symmetric else loss

    def _search(self, sides: Sides, anchor: End, positive: End) -> torch.Tensor:
        rank = sides.batch.rank
        logits = self.scale * self._products(sides, anchor, positive)
        excluded = sides.excluded(self.config.mask, anchor.side, positive.side)
        known = _is_known(sides, anchor, positive)
        if known is None:
            return info_nce(logits, rank=rank, excluded=excluded).mean()
        known_columns = sides.batch.gather(known)
        unknown = off_diagonal(~known_columns.expand(len(logits), -1), rank)
        excluded = unknown if excluded is None else excluded | unknown
        losses = info_nce(logits, rank=rank, excluded=excluded)
        # The workers' mean must be the mean over all rows with a teacher, wherever they are.
        share = known_columns.to(losses.dtype).mean().clamp(min=1 / len(known_columns))
        return torch.where(known, losses, 0.0).mean() / share

    def _products(self, sides: Sides, anchor: End, positive: End) -> torch.Tensor:
        if self.projector is None:
            return sides.products(anchor, positive)
        rows, columns = (self._projected(sides, end) for end in (anchor, positive))
        return rows @ sides.batch.gather(columns).T

    def _projected(self, sides: Sides, end: End) -> torch.Tensor:
        if self.projector is None or end.name != self.config.key(self.config.anchor):
            return sides.rows(end)
        rows = self.projector(sides.rows(replace(end, unit=False)))
        return functional.normalize(rows, dim=1) if end.unit else rows


def info_nce(
    logits: torch.Tensor, *, rank: int = 0, excluded: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of finding one's own partner among all columns.

    Args:
        logits: float [B, C] scaled similarities.
        rank: row i belongs to column rank·B + i.
        excluded: bool [B, C], columns that are no negatives of a row.

    Returns:
        float [B], one loss per row.
    """
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    own = torch.arange(len(logits), device=logits.device) + rank * len(logits)
    return functional.cross_entropy(logits, own, reduction="none")


def _is_known(sides: Sides, *ends: End) -> torch.Tensor | None:
    """Rows whose teacher vectors are not zero, bool [B]; None without a teacher."""
    teachers = [end for end in ends if end.name.partition(".")[0] in TEACHER_TENSORS]
    rows = [sides.tensors[end.side][end.name].any(dim=1) for end in teachers]
    return torch.stack(rows).all(dim=0) if rows else None


def _projector(kind: str, width: int, wanted: int) -> nn.Module | None:
    if kind == "none":
        return None
    if kind == "linear":
        return nn.Linear(width, wanted)
    hidden = (width + wanted) // 2
    return nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(), nn.Linear(hidden, wanted))
