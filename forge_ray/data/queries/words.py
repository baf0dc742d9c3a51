"""Queries made from the texts of the items that were wanted, for data without a query log.

A query keeps some words of the text in their order, in lower case, now and then with a typing
error. Which ones is a hash of the seed, the user and the place in the user's history: no row
depends on another. Such queries are *synthetic*: they only use words that stand in the text, which
real ones do not, and whatever is measured on them is labelled so.

Where a script puts no space between words, a query is of pairs of characters (`text.words`), those
that overlap in the text written as one piece, and of at most half of them: never the whole text,
but where that is one pair.

Knows texts and hashes; knows nothing about files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_ray.data.hashing import unit_uniform
from forge_ray.data.queries.text import is_unspaced, word_runs
from forge_ray.errors import ConfigError

_MOST_WORDS = 24
"""Words of a text that a query is drawn from."""
_BLOCK_ROWS = 65536
"""Queries whose draws, one for each word, are in memory at a time: 13 MB of them."""
_SHORTEST_MISTYPED = 4


@dataclass(kw_only=True)
class DeriveConfig:
    """How a text becomes a query."""

    column: str = "title"
    """Column of the items with the text."""
    max_words: int = 3
    """Most words of a query; their number is uniform from 1 on."""
    typo_rate: float = 0.1
    """Share of queries whose longest word has two letters swapped, or one left out."""
    ignore: str = r"\([^)]*\)"
    """Regular expression of what is no part of the text, by default all in parentheses; a text of
    nothing else is taken whole."""
    seed: int = 0
    """Another seed gives other queries."""

    def __post_init__(self) -> None:
        """Checks the ranges and the expression."""
        if self.max_words < 1:
            raise ConfigError(f"derive.max_words must be >= 1, got {self.max_words}. Use e.g. 3.")
        if not 0.0 <= self.typo_rate <= 1.0:
            raise ConfigError(
                f"derive.typo_rate must be in [0, 1], got {self.typo_rate}. Use e.g. 0.1."
            )
        if self.seed < 0:
            raise ConfigError(f"derive.seed must be >= 0, got {self.seed}. Use another seed.")
        try:
            re.compile(self.ignore)
        except re.error as error:
            raise ConfigError(
                f"derive.ignore must be a regular expression, got {self.ignore!r}: {error}. "
                "Correct it, or leave it empty."
            ) from error


@dataclass(frozen=True, slots=True)
class _Words:
    """A text as queries are drawn from it.

    Attributes:
        words: W of them.
        overlaps: whether each begins with the last character of the one before it.
    """

    words: list[str]
    overlaps: list[bool]

    @classmethod
    def of(cls, text: str) -> _Words:
        runs = word_runs(text)
        words = [word for run in runs for word in run]
        overlaps = [at > 0 for run in runs for at in range(len(run))]
        return cls(words[:_MOST_WORDS], overlaps[:_MOST_WORDS])

    @property
    def most(self) -> int:
        """Words of the longest query.

        A run of n pairs has n + 1 characters, and half of the pairs have at most n of them.
        """
        count = len(self.words)
        return max(1, count // 2) if any(map(is_unspaced, self.words)) else count

    def written(self, chosen: list[int], words: list[str]) -> str:
        """The chosen words, as they stand here or mistyped, as one text."""
        text = "".join(words[:1])
        for word, (before, at) in zip(words[1:], pairwise(chosen), strict=True):
            text += word[1:] if self.overlaps[at] and at == before + 1 else f" {word}"
        return text


class QueryMaker:
    """Makes queries; splits every text once."""

    def __init__(self, texts: Sequence[str | None], config: DeriveConfig) -> None:
        """Keeps the texts.

        Args:
            texts: of the items that will be asked for.
            config: how they become queries.
        """
        self._texts = texts
        self._config = config
        self._ignored = re.compile(config.ignore) if config.ignore else None
        self._words: dict[int, _Words] = {}

    def queries(self, items: NDArray[np.integer[Any]], keys: NDArray[np.int64]) -> list[str]:
        """One query for each row, empty where the item's text has no word.

        Args:
            items: int [R], places in the texts.
            keys: int64 [R], what tells the rows apart; equal keys draw the same numbers.
        """
        found: list[str] = []
        for start in range(0, len(items), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            found += self._block(items[block], keys[block])
        return found

    def _block(self, items: NDArray[np.integer[Any]], keys: NDArray[np.int64]) -> list[str]:
        config, salt = self._config, self._config.seed * 64
        count, typo, kind, place = (unit_uniform(keys, salt=salt + one) for one in range(4))
        order = np.stack([unit_uniform(keys, salt=salt + 4 + one) for one in range(_MOST_WORDS)], 1)
        found = []
        for row, item in enumerate(items.tolist()):
            text = self._split(item)
            kept = min(text.most, 1 + int(count[row] * config.max_words))
            drawn = np.argsort(order[row, : len(text.words)], kind="stable")[:kept]
            chosen = np.sort(drawn).tolist()
            query = [text.words[one] for one in chosen]
            if query and typo[row] < config.typo_rate:
                query = _mistyped(query, drops=bool(kind[row] < 0.5), place=float(place[row]))
            found.append(text.written(chosen, query))
        return found

    def _split(self, item: int) -> _Words:
        if item not in self._words:
            text = (self._texts[item] or "").lower()
            bare = self._ignored.sub(" ", text) if self._ignored else text
            found = _Words.of(bare)
            self._words[item] = found if found.words else _Words.of(text)
        return self._words[item]


def _mistyped(words: list[str], *, drops: bool, place: float) -> list[str]:
    """The words with an error inside the longest, but its first letter, which people hit."""
    longest = max(range(len(words)), key=lambda one: len(words[one]))
    word = words[longest]
    if len(word) < _SHORTEST_MISTYPED:
        return words
    at = 1 + int(place * (len(word) - 2))
    wrong = (
        word[:at] + ("" if drops else word[at + 1] + word[at]) + word[at + (1 if drops else 2) :]
    )
    return [*words[:longest], wrong, *words[longest + 1 :]]
