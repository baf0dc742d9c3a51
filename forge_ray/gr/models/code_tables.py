"""Which rows of a generator's parameters stand for codes: what a change of SIDs makes meaningless.

Everything else in a generator means the same under any SID table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from forge_ray.gr.vocab import Vocab


@dataclass(frozen=True, kw_only=True)
class CodeTable:
    """A parameter [before + codes + after, …] with a row for each code or prefix of codes.

    Attributes:
        rows: rows int64 [N, R] that items with codes int64 [N, L] are read or scored by.
        levels: level of each of the R columns.
        before: rows in front that belong to no code, such as special tokens.
        num_rows: rows of codes; those behind them belong to no code either.
    """

    rows: Callable[[Tensor], Tensor]
    levels: tuple[int, ...]
    before: int
    num_rows: int


def token_rows(vocab: Vocab) -> CodeTable:
    """A table indexed by token id."""
    return CodeTable(
        rows=vocab.tokens,
        levels=tuple(range(vocab.num_levels)),
        before=vocab.num_special,
        num_rows=vocab.size - vocab.num_special,
    )


def code_rows(vocab: Vocab) -> CodeTable:
    """A table of the codes of all levels, without special tokens."""
    return CodeTable(
        rows=lambda codes: vocab.tokens(codes) - vocab.num_special,
        levels=tuple(range(vocab.num_levels)),
        before=0,
        num_rows=vocab.size - vocab.num_special,
    )


def hashed_rows(
    hashes: Callable[[Tensor], Tensor], levels: tuple[int, ...], num_rows: int
) -> CodeTable:
    """A table of prefixes: `hashes` [N, L] of those that end at each level, modulo its rows."""
    return CodeTable(
        rows=lambda codes: hashes(codes)[:, levels[0] : levels[-1] + 1] % num_rows,
        levels=levels,
        before=0,
        num_rows=num_rows,
    )
