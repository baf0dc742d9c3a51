"""From a rank's rows of item indices to the token batches of its forward passes.

Knows rows and the codes of items. Knows nothing about streams, models or optimisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged
from forge_ray.gr.models.base import TokenBatch
from forge_ray.gr.scripts import ScriptBatch
from forge_ray.gr.vocab import Vocab


def micro_batches(
    rows: Ragged, codes: NDArray[np.integer[Any]], count: int, *, is_packed: bool
) -> list[TokenBatch]:
    """A rank's rows as exactly `count` batches.

    Padded passes get neighbours in length, so that little of them is padding. To packed passes rows
    are dealt there and back, so that each holds nearly the same number of tokens.

    Args:
        rows: item indices, sorted by length; may be fewer than `count`.
        codes: [num_items, L].
        count: forward passes of the step; every rank makes the same number.
        is_packed: whether the model packs its rows.
    """
    numbers = np.arange(len(rows))
    if is_packed:
        turn, place = np.divmod(numbers, count)
        dealt = np.where(turn % 2, count - 1 - place, place)
        parts = [numbers[dealt == one] for one in range(count)]
    else:
        parts = np.array_split(numbers, count)
    return [_token_batch(rows.take(part), codes) for part in parts]


def with_scripts(
    batches: Sequence[TokenBatch], scripts: Ragged, codes: NDArray[np.integer[Any]], vocab: Vocab
) -> list[TokenBatch]:
    """The same batches, with a rank's scripts spread over them by length.

    Args:
        batches: of histories.
        scripts: rows of the tasks with text; may be fewer than batches.
        codes: [num_items, L].
        vocab: of the SID table.
    """
    order = np.argsort(scripts.lengths, kind="stable")
    parts = np.array_split(order, len(batches))
    return [
        replace(batch, scripts=ScriptBatch.of(scripts.take(part), codes, vocab))
        for batch, part in zip(batches, parts, strict=True)
    ]


def _token_batch(rows: Ragged, codes: NDArray[np.integer[Any]]) -> TokenBatch:
    if not len(rows):
        nothing = torch.zeros(1, 1, codes.shape[1], dtype=torch.int64)
        return TokenBatch(nothing, torch.zeros(1, dtype=torch.int64))
    padded = rows.padded(side="right", fill=0)
    return TokenBatch(
        torch.from_numpy(codes[padded].astype(np.int64)), torch.from_numpy(rows.lengths)
    )
