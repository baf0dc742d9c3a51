"""The trainable alignment: some terms, the user side if a term needs it, one loss per term."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from forge_ray.errors import ConfigError
from forge_ray.sid.alignment.batch import AlignmentBatch, UserView, View
from forge_ray.sid.alignment.sides import Sides
from forge_ray.sid.alignment.terms import Term, TermConfig
from forge_ray.sid.alignment.users import UserCodes, UserTokenizer, UserTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class AlignmentDims:
    """Widths of what a batch will hold."""

    inputs: int
    """D of x and x̂."""
    latents: int
    """d of z and z_q."""
    middle: int
    """h of the decoder's first hidden layer."""
    teachers: Mapping[str, int] = field(default_factory=dict)
    """t by teacher, of items and users alike."""
    users: int = 0
    """Width of user inputs; 0 when there are none."""


class Alignment(nn.Module):
    """A weighted sum of contrastive terms; parameters are temperatures, projectors, the user side.

    Parameters stay in float32 and so do the losses, whatever autocast surrounds the call.
    """

    sources: Mapping[str, float]
    """Share of the pair batches (or pair rows) by source; sums to 1, empty without pairs."""
    reads_identity: bool
    """Whether a term reads batches of source `identity`."""
    terms: nn.ModuleDict
    users: UserTokenizer | None
    coded_users: UserCodes | None
    """Users of the last batch, for what moves their codebooks; None when it had none."""

    def __init__(
        self,
        terms: Mapping[str, TermConfig],
        dims: AlignmentDims,
        *,
        sources: Mapping[str, float],
        users: UserTokenizerConfig,
    ) -> None:
        """Set up the terms.

        Args:
            terms: by name.
            dims: widths of the tensors.
            sources: share of the batches by pair source.
            users: the user side, built when a term reads user codes.

        Raises:
            ConfigError: when a term compares different widths, or names an unknown teacher.
        """
        super().__init__()
        self.sources = dict(sources)
        self.reads_identity = any(term.source == "identity" for term in terms.values())
        self.terms = nn.ModuleDict(
            {name: Term(name, term, _widths(term, dims, users)) for name, term in terms.items()}
        )
        reads_users = any({"user_z", "user_z_q"} & {*term.tensors} for term in terms.values())
        self.users = UserTokenizer(users, dims.users) if reads_users else None
        self.coded_users = None

    def forward(self, batch: AlignmentBatch) -> dict[str, torch.Tensor]:
        """Compute the weighted losses of the terms that read this batch's source.

        Args:
            batch: B pairs of one source.

        Returns:
            One scalar per term, and `users` for the user side's own loss; their sum is to be
            minimised. Empty when no term reads the source.
        """
        self.coded_users = None
        with torch.autocast(batch.anchor.latents.device.type, enabled=False):
            return self._losses(batch)

    def scales(self) -> dict[str, float]:
        """The inverse temperatures that are learned, by term, for the log."""
        scales = {
            name: float(torch.as_tensor(term.scale).detach())
            for name, term in self.named_terms()
            if term.log_scale is not None
        }
        return {f"scale_{name}": scale for name, scale in scales.items()}

    def _losses(self, batch: AlignmentBatch) -> dict[str, torch.Tensor]:
        terms = {name: term for name, term in self.named_terms() if term.reads(batch.source)}
        if not terms:
            return {}
        losses: dict[str, torch.Tensor] = {}
        anchor, positive = _item_tensors(batch.anchor), _item_tensors(batch.positive)
        anchor |= {f"teacher.{name}": rows for name, rows in batch.teachers.items()}
        if batch.user is not None and batch.user_positive is not None:
            anchor |= {f"user_teacher.{name}": rows for name, rows in batch.user.teachers.items()}
            losses |= self._code_users(batch, (batch.user, batch.user_positive), anchor, positive)
        sides = Sides(batch, (_full(anchor), _full(positive)))
        for name, term in terms.items():
            losses[name] = term.config.weight_at(batch.progress) * term(sides)
        return losses

    def named_terms(self) -> Iterator[tuple[str, Term]]:
        """The terms by name."""
        for name, term in self.terms.items():
            yield name, cast(Term, term)

    def _code_users(
        self,
        batch: AlignmentBatch,
        users: tuple[UserView, UserView],
        anchor: dict[str, torch.Tensor],
        positive: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Add the user tensors to both sides and return the user side's own loss."""
        if self.users is None:
            return {}
        inputs = _full({"users": torch.cat([view.inputs for view in users])})["users"]

        def gather(rows: torch.Tensor) -> torch.Tensor:
            # All users, then all the others, as one worker has them: codebooks start on rows.
            return torch.cat([batch.gather(half) for half in rows.chunk(2)])

        coded = self.coded_users = self.users(inputs, gather=gather)
        for name, rows in (("user_z", coded.latents), ("user_z_q", coded.quantized)):
            anchor[name], positive[name] = rows.chunk(2)
        return {"users": self.users.config.weight * coded.loss}


def _item_tensors(view: View) -> dict[str, torch.Tensor]:
    return {
        "x": view.inputs,
        "z": view.latents,
        "z_q": view.quantized,
        "x_hat": view.reconstruction,
        "middle": view.middle,
    }


def _full(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Half-precision tensors as float32: exponents of sharp similarities need the digits."""
    return {
        name: rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        for name, rows in tensors.items()
    }


def _widths(term: TermConfig, dims: AlignmentDims, users: UserTokenizerConfig) -> tuple[int, int]:
    """Columns of a term's two ends.

    Raises:
        ConfigError: when an end is a teacher or user that the batches will not hold.
    """
    known = {
        "x": dims.inputs,
        "z": dims.latents,
        "z_q": dims.latents,
        "x_hat": dims.inputs,
        "middle": dims.middle,
        "user_z": users.latent_dim,
        "user_z_q": users.latent_dim,
        "teacher": dims.teachers.get(term.teacher, 0),
        "user_teacher": dims.teachers.get(term.teacher, 0),
    }
    if term.has_teacher and term.teacher not in dims.teachers:
        raise ConfigError(
            f"alignment teacher must be one of {', '.join(dims.teachers) or '(none)'}, got "
            f"{term.teacher!r}. Name it under alignment.teachers."
        )
    if term.has_users and not dims.users:
        raise ConfigError(
            f"alignment term with {' and '.join(term.tensors)} must have user vectors, got none. "
            "Fit on a dataset with train sequences."
        )
    return known[term.anchor], known[term.positive]
