"""Rows of text and items: how a task is written down before its items become codes.

A *script* is a row of int32: an item index, a text token, the mark at which a row begins, or the
mark between question and answer. Scripts travel through the stream as histories do, so shards,
order, shares of ranks and cursors are theirs too; items become codes where the batch is used. Knows
tokenizers and codes; knows nothing about models or files.

Shapes: B rows, N items, L levels, Q tokens of a question, A tokens of an answer.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forge_ray.data.ragged import Ragged
from forge_ray.gr.tasks import TasksConfig
from forge_ray.gr.vocab import BOS, PAD, Vocab

ANSWER = -1
"""What follows is the answer."""
START = -2
"""The token that begins a row, where the model wants one."""
_TEXT = -3
"""Text token t is `_TEXT - t`."""

Piece = list[int] | str
"""A part of a template: entries of a script, or the name of what stands there."""


def text_entries(tokens: Sequence[int]) -> list[int]:
    """Entries of a script for text tokens."""
    return [_TEXT - int(token) for token in tokens]


@dataclass(frozen=True)
class TaskText:
    """All that turns texts into scripts; a model that reads text is published with it.

    Attributes:
        tokenizer: of the library `tokenizers`, as JSON.
        templates: pieces by task template (`search`, `item`, `text`).
        end: text token that ends a written text; -1 for none.
        closes: whether `end` also follows the codes of an answer.
        max_tokens: leading tokens kept of a text.
    """

    tokenizer: str
    templates: dict[str, list[Piece]]
    end: int
    closes: bool
    max_tokens: int

    def to_json(self) -> str:
        """The content of a file."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> TaskText:
        """What `to_json` wrote."""
        return cls(**json.loads(text))

    def questions(self, histories: Ragged, queries: Sequence[str]) -> Ragged:
        """Scripts of searches without an answer, for decoding.

        Args:
            histories: B rows of item indices; rows may be empty.
            queries: B texts.
        """
        texts = self._encoded(queries)
        return _ragged(
            self._question("search", history=histories.row(row).tolist(), query=text)
            for row, text in enumerate(texts)
        )

    def searches(
        self, histories: Ragged, queries: Sequence[str], targets: NDArray[np.integer[Any]]
    ) -> Ragged:
        """Scripts of searches with the item that was wanted, targets [B]."""
        asked = self.questions(histories, queries)
        return _ragged(
            [*asked.row(row).tolist(), ANSWER, item, *self._closing]
            for row, item in enumerate(targets.tolist())
        )

    def item_to_sid(self, items: NDArray[np.integer[Any]], texts: Sequence[str]) -> Ragged:
        """Scripts from the texts of items [B] to the items."""
        pairs = zip(items.tolist(), self._encoded(texts), strict=True)
        return _ragged(
            [*self._question("item", text=text), ANSWER, item, *self._closing]
            for item, text in pairs
        )

    def sid_to_text(self, items: NDArray[np.integer[Any]], texts: Sequence[str]) -> Ragged:
        """Scripts from items [B] to their texts."""
        end = text_entries([self.end]) if self.end >= 0 else []
        pairs = zip(items.tolist(), self._encoded(texts), strict=True)
        return _ragged(
            [*self._question("text", item=[item]), ANSWER, *text, *end] for item, text in pairs
        )

    @property
    def _closing(self) -> list[int]:
        return text_entries([self.end]) if self.closes else []

    def _question(self, template: str, **places: list[int]) -> list[int]:
        pieces = self.templates[template]
        return [
            entry
            for piece in pieces
            for entry in (places[piece] if isinstance(piece, str) else piece)
        ]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = _open_tokenizer(self.tokenizer)
        # One at a time: batches would start as many threads as there are cores.
        found = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        return [text_entries(ids[: self.max_tokens]) for ids in found]


@lru_cache(maxsize=2)
def _open_tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(text)


def make_task_text(
    config: TasksConfig,
    *,
    tokenizer: str,
    tokenize: Callable[[str], Sequence[int]],
    head: list[int],
    tail: list[int],
    end: int,
    closes: bool,
) -> TaskText:
    """Templates as tokens of a checkpoint.

    The pieces around a place are tokenized apart, as a tokenizer does that splits at added tokens.

    Args:
        config: has the templates.
        tokenizer: see `TaskText`.
        tokenize: text tokens of a piece.
        head: entries before every question.
        tail: entries after every question.
        end: see `TaskText`.
        closes: see `TaskText`.
    """
    given = {
        "search": config.search_prompt,
        "item": config.item_prompt,
        "text": config.text_prompt,
    }
    templates = {}
    for name, template in given.items():
        pieces: list[Piece] = [head]
        for text, place, _, _ in string.Formatter().parse(template):
            pieces.append(text_entries(tokenize(text)) if text else [])
            if place is not None:
                pieces.append(place)
        templates[name] = [piece for piece in [*pieces, tail] if piece]
    return TaskText(tokenizer, templates, end, closes, config.max_tokens)


def answer_sizes(scripts: Ragged, num_levels: int) -> NDArray[np.int64]:
    """Target tokens of each row, int64 [B]."""
    return _sizes(scripts, num_levels).answers


@dataclass(frozen=True)
class ScriptBatch:
    """Training rows of text and codes as token ids, padded on the right.

    Attributes:
        questions: int64 [B, Q].
        question_lengths: int64 [B], at least 1.
        answers: int64 [B, A].
        answer_lengths: int64 [B]; 0 is a row that counts for nothing.
    """

    questions: Tensor
    question_lengths: Tensor
    answers: Tensor
    answer_lengths: Tensor

    @classmethod
    def of(cls, scripts: Ragged, codes: NDArray[np.integer[Any]], vocab: Vocab) -> ScriptBatch:
        """From scripts with an answer; without rows it is one row that counts for nothing.

        Args:
            scripts: B rows.
            codes: [N, L].
            vocab: of the SID table.
        """
        if not len(scripts):
            nothing = torch.full((1, 1), BOS, dtype=torch.int64)
            one = torch.ones(1, dtype=torch.int64)
            return cls(nothing, one, torch.full_like(nothing, PAD), torch.zeros_like(one))
        tokens, sizes = script_tokens(scripts, codes, vocab), _sizes(scripts, vocab.num_levels)
        starts = tokens.offsets[:-1]
        questions = tokens.slices(starts, sizes.questions)
        answers = tokens.slices(starts + sizes.questions, sizes.answers)
        parts = [
            torch.from_numpy(one)
            for rows in (questions, answers)
            for one in (rows.padded(side="right", fill=PAD), rows.lengths)
        ]
        return cls(*parts)

    def to(self, device: torch.device) -> ScriptBatch:
        """The batch on another device."""
        return ScriptBatch(*(one.to(device, non_blocking=True) for one in self.__dict__.values()))

    @property
    def is_target(self) -> Tensor:
        """Which tokens of `answers` are targets, bool [B, A]."""
        column = torch.arange(self.answers.shape[1], device=self.answers.device)
        return column < self.answer_lengths.unsqueeze(1)


def script_tokens(scripts: Ragged, codes: NDArray[np.integer[Any]], vocab: Vocab) -> Ragged:
    """Token ids of scripts, questions and answers in one piece, int64.

    Args:
        scripts: B rows.
        codes: [N, L].
        vocab: of the SID table; text tokens follow its ids.
    """
    levels, values = vocab.num_levels, scripts.values.astype(np.int64)
    spans = np.where(values >= 0, levels, (values != ANSWER).astype(np.int64))
    place = np.cumsum(spans) - spans
    out = np.empty(int(spans.sum()), dtype=np.int64)
    is_item, is_text = values >= 0, values <= _TEXT
    out[place[values == START]] = BOS
    out[place[is_text]] = vocab.size + (_TEXT - values[is_text])
    starts = np.array(vocab.level_offsets) + vocab.num_special
    rows = codes[values[is_item]].astype(np.int64) + starts
    out[place[is_item][:, None] + np.arange(levels)] = rows
    return Ragged.from_lengths(out, _row_sums(spans, scripts))


@dataclass(frozen=True)
class _Sizes:
    """Tokens of each row's question and answer, int64 [B]."""

    questions: NDArray[np.int64]
    answers: NDArray[np.int64]


def _sizes(scripts: Ragged, num_levels: int) -> _Sizes:
    values = scripts.values
    spans = np.where(values >= 0, num_levels, (values != ANSWER).astype(np.int64))
    marks = np.cumsum(values == ANSWER)
    before = np.concatenate([[0], marks])[scripts.offsets[:-1]]
    is_answer = marks > np.repeat(before, scripts.lengths)
    answers = _row_sums(np.where(is_answer, spans, 0), scripts)
    return _Sizes(_row_sums(spans, scripts) - answers, answers)


def _row_sums(values: NDArray[np.integer[Any]], rows: Ragged) -> NDArray[np.int64]:
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return sums[rows.offsets[1:]] - sums[rows.offsets[:-1]]


def _ragged(rows: Any) -> Ragged:
    return Ragged.from_lists(rows, dtype=np.int32)
