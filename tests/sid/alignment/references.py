"""The losses as plain loops over rows, written from the formulas and slow on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Row = np.ndarray
IsNegative = Callable[[int, int], bool]


def unit(row: Row) -> Row:
    return row / math.sqrt(sum(x * x for x in row))


def info_nce(
    anchors: Sequence[Row],
    positives: Sequence[Row],
    *,
    scale: float,
    is_negative: IsNegative = lambda i, j: True,
    counts: Sequence[bool] | None = None,
) -> float:
    """Mean over the rows that count of −log(e^{s_ii} / Σ_{j = i or negative} e^{s_ij})."""
    losses = []
    for i, anchor in enumerate(anchors):
        if counts is not None and not counts[i]:
            continue
        total = 0.0
        for j, positive in enumerate(positives):
            is_seen = counts is None or counts[j]
            if i == j or (is_seen and is_negative(i, j)):
                total += math.exp(scale * float(anchor @ positive))
        losses.append(math.log(total) - scale * float(anchor @ positives[i]))
    return sum(losses) / len(losses)


def shares_an_end(first: Sequence[int], second: Sequence[int], i: int, j: int) -> bool:
    return bool({first[i], second[i]} & {first[j], second[j]})


def hamr(
    latents: Sequence[Row],
    codes: Sequence[Sequence[int]],
    items: Sequence[int],
    related: set[tuple[int, int]],
) -> float:
    """λ_full = .2, λ_part = .1, margins .8 and .5, partial collisions differ in one level."""
    full, part = [], []
    for i, left in enumerate(latents):
        for j, right in enumerate(latents):
            pair = (min(items[i], items[j]), max(items[i], items[j]))
            if items[i] == items[j] or pair in related:
                continue
            distance = 1 - float(unit(left) @ unit(right))
            apart = sum(a != b for a, b in zip(codes[i], codes[j], strict=True))
            if apart == 0:
                full.append(max(0.0, 0.8 - distance))
            elif apart == 1:
                part.append(max(0.0, 0.5 - distance))
    return 0.2 * sum(full) / max(len(full), 1) + 0.1 * sum(part) / max(len(part), 1)


def diversity(codes: Sequence[int], book: np.ndarray, groups: Sequence[int]) -> float:
    """Mean over rows and over the possible partners of the cross-entropy of one level."""
    losses = []
    for code in codes:
        scores = {j: float(book[code] @ book[j]) for j in range(len(book)) if j != code}
        total = math.log(sum(math.exp(score) for score in scores.values()))
        partners = [j for j in scores if groups[j] == groups[code]]
        draws = [total - scores[j] for j in partners]
        losses.append(sum(draws) / len(draws) if draws else 0.0)
    return sum(losses) / len(losses)
