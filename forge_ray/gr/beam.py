"""Constrained beam search: from histories to the most probable SIDs that exist.

Knows a stepwise generator (logits per level, key/value state) and a prefix index. Knows nothing
about items, buckets or files. The search is deterministic: no sampling, and equal scores are
ordered by SID, lexicographically.

Scores are true model log-probabilities: the softmax of a level runs over that level's *whole*
codebook, and codes that the index forbids are dropped afterwards **without renormalising**. A
beam's score therefore does not depend on what else is in the catalogue, and summing exp(score) over
all SIDs gives the model's mass on valid SIDs.

Shapes: B users, W beams, L levels, K codes of a level, M widest branching of a level, C =
candidates of one user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from forge_ray.errors import ConfigError, TrainingError
from forge_ray.gr.prefix_index import PrefixIndex


class StepwiseGenerator(Protocol):
    """What the search needs of a model; :class:`forge_ray.gr.models.base.Generator` is one."""

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Read histories [B, S]; logits of level 0, [B, K_0], and the state."""

    def step(self, state: Any, parents: Tensor, codes: Tensor, level: int) -> tuple[Tensor, Any]:
        """Feed the codes of ``level - 1`` and read the logits of ``level``, [B, W, K_level].

        Args:
            state: what the call before returned.
            parents: int64 [B, W], which beam of that state each new beam continues.
            codes: int64 [B, W], the code chosen for it at ``level - 1``.
            level: 1..L-1.
        """


@dataclass(frozen=True, slots=True)
class Beams:
    """Ranked SIDs of a batch of users, best first.

    A slot is *dead* (score -inf, codes and rank -1) when fewer SIDs were reachable than the width
    asked for; it is never filled with anything else. A live slot with ``sid_rank`` -1 is an invalid
    SID, which only an unconstrained search can emit.

    Attributes:
        codes: int64 [B, W, L].
        scores: float32 [B, W], sums of log-probabilities, descending.
        sid_rank: int64 [B, W], row among the sorted distinct SIDs of the index.
    """

    codes: Tensor
    scores: Tensor
    sid_rank: Tensor

    @property
    def is_live(self) -> Tensor:
        """Whether a slot holds a SID, bool [B, W]."""
        return torch.isfinite(self.scores)


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Extensions of all beams of each user, [B, C]; ``ties`` orders equal scores."""

    scores: Tensor
    codes: Tensor
    rows: Tensor
    ties: Tensor
    per_parent: int


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The beams carried to the next level, all [B, W]."""

    scores: Tensor
    codes: Tensor
    rows: Tensor
    parents: Tensor


def default_widths(num_levels: int, *, max_k: int) -> tuple[int, ...]:
    """Beam widths that fill lists of ``max_k`` items.

    Carries ``max(50, max_k)`` beams and returns twice as many: the last width costs no model step,
    and the surplus replaces beams whose items the user has all seen.
    """
    carried = max(50, max_k)
    return (carried,) * (num_levels - 1) + (2 * carried,)


@torch.no_grad()
def beam_search(
    generator: StepwiseGenerator,
    tokens: Tensor,
    mask: Tensor,
    index: PrefixIndex,
    widths: Sequence[int],
    *,
    constrained: bool = True,
) -> Beams:
    """Decode the best SIDs of each history, level by level.

    With widths as large as the number of prefixes of each level the result is exact: the order of
    all SIDs under the model. Work per step depends on the beams and the branching, not on the
    catalogue's size.

    Args:
        generator: in evaluation mode, on the device of the inputs.
        tokens: int64 [B, S], history tokens, left padded.
        mask: bool or int64 [B, S], 0 on padding.
        index: prefixes of the valid SIDs, on the same device.
        widths: beams to keep after each of the L levels (FORGE's published widening search is 200,
            400, 1200).
        constrained: False searches all code combinations and marks those that do not exist; for
            measuring the invalid rate a model would have without the index.

    Returns:
        Beams with W = ``widths[-1]``.

    Raises:
        ConfigError: when widths do not fit the levels.
        TrainingError: when the model emits NaN.
    """
    _check_widths(widths, index.num_levels)
    expand = _constrained if constrained else _unconstrained
    logits, state = generator.prefill(tokens, mask)
    logits = logits.unsqueeze(1)
    rows = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
    chosen = _Chosen(torch.zeros_like(rows, dtype=torch.float32), rows, rows, rows)
    codes = rows.new_empty((*rows.shape, 0))
    for level, width in enumerate(widths):
        if level > 0:
            logits, state = generator.step(state, chosen.parents, chosen.codes, level)
        chosen = _select(expand(index, level, chosen, checked_log_probs(logits, level)), width)
        history = codes.gather(1, chosen.parents.unsqueeze(-1).expand(-1, -1, codes.shape[-1]))
        codes = torch.cat([history, chosen.codes.unsqueeze(-1)], dim=-1)
    return _padded(codes, chosen, widths[-1])


def checked_log_probs(logits: Tensor, level: int) -> Tensor:
    """Log-softmax of a level's logits [..., K], float32.

    Raises:
        TrainingError: they hold NaN.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    if bool(torch.isnan(log_probs).any()):
        raise TrainingError(
            f"generator logits of level {level} must be finite, got NaN. "
            "The model has diverged: lower the learning rate or use an earlier checkpoint."
        )
    return log_probs


def _constrained(index: PrefixIndex, level: int, beams: _Chosen, log_probs: Tensor) -> _Candidates:
    kids = index.children(level, beams.rows)
    scores = beams.scores.unsqueeze(-1) + log_probs.gather(-1, kids.codes)
    scores = scores.masked_fill(~kids.valid, -torch.inf)
    rows = kids.rows.flatten(1)
    return _Candidates(scores.flatten(1), kids.codes.flatten(1), rows, rows, kids.codes.shape[-1])


def _unconstrained(
    index: PrefixIndex, level: int, beams: _Chosen, log_probs: Tensor
) -> _Candidates:
    size = log_probs.shape[-1]
    codes = torch.arange(size, device=log_probs.device).expand(log_probs.shape)
    rows = index.lookup(level, beams.rows.unsqueeze(-1).expand(codes.shape), codes.contiguous())
    scores = (beams.scores.unsqueeze(-1) + log_probs).flatten(1)
    order = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    return _Candidates(scores, codes.flatten(1), rows.flatten(1), order, size)


def _select(candidates: _Candidates, width: int) -> _Chosen:
    """The best candidates of each user; slots beyond the live ones are dead (row -1, code 0)."""
    num_candidates = candidates.scores.shape[1]
    keys = sort_keys(candidates.scores, candidates.ties)
    slots = keys.topk(min(width, num_candidates), dim=1).indices
    scores = candidates.scores.gather(1, slots)
    # The widest user sets the width: beams that are dead for everyone are not carried.
    live = max(1, int(torch.isfinite(scores).sum(dim=1).max()))
    slots, scores = slots[:, :live], scores[:, :live]
    is_dead = scores == -torch.inf
    return _Chosen(
        scores=scores,
        codes=candidates.codes.gather(1, slots).masked_fill(is_dead, 0),
        rows=candidates.rows.gather(1, slots).masked_fill(is_dead, -1),
        parents=(slots // candidates.per_parent).masked_fill(is_dead, 0),
    )


def sort_keys(scores: Tensor, ties: Tensor) -> Tensor:
    """One int64 per candidate: score descending, then tie ascending, so top-k is deterministic.

    The bits of a float32 order like a signed integer once the magnitude of negatives is inverted;
    they take the upper half of the key. ``ties`` must be in [0, 2**32).
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (ordered << 32) - ties


def _padded(codes: Tensor, chosen: _Chosen, width: int) -> Beams:
    missing = width - codes.shape[1]
    is_dead = chosen.scores == -torch.inf
    codes = codes.masked_fill(is_dead.unsqueeze(-1), -1)
    pad = torch.nn.functional.pad
    return Beams(
        codes=pad(codes, (0, 0, 0, missing), value=-1),
        scores=pad(chosen.scores, (0, missing), value=-torch.inf),
        sid_rank=pad(chosen.rows, (0, missing), value=-1),
    )


def _check_widths(widths: Sequence[int], num_levels: int) -> None:
    if len(widths) != num_levels or min(widths) < 1:
        raise ConfigError(
            f"widths must be {num_levels} integers >= 1 (one per SID level), got {list(widths)}. "
            "Give the number of beams to keep after each level."
        )
