"""Numbering the items of a SID on a level of its own; shared by `extra_token` and `pop_rank`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forge_ray.sid.resolvers.base import Int64Array, IntArray, Placement, Problem, Resolution
from forge_ray.sid.resolvers.groups import positions


def number_items(problem: Problem, *order_by: npt.NDArray[np.generic]) -> Placement:
    """Append the number of each item inside its SID.

    Args:
        problem: published rows keep their number; a published table without the extra level had
            no collision, so its items hold number 0.
        order_by: arrays [N] that order the items of a SID, the first one deciding first.

    Returns:
        Codes [N, L + 1]. New items take the numbers after the largest published one of their SID.
    """
    old = _published_numbers(problem)
    token = np.maximum(old, 0)
    crowded = problem.groups.crowded(1)
    rows, keys = crowded.order, crowded.keys
    # Published first, by their number: what follows the last of them is the next free number.
    by = (old[rows] < 0, old[rows], *(values[rows] for values in order_by))
    rows = rows[np.lexsort((*by[::-1], keys))]
    is_old = old[rows] >= 0
    if len(rows):
        first_free = np.maximum.reduceat(old[rows], crowded.starts) + 1
        num_old = np.add.reduceat(is_old.astype(np.int64), crowded.starts)
        number = positions(keys) + np.repeat(first_free - num_old, crowded.sizes)
        token[rows] = np.where(is_old, old[rows], number)
    return Placement(np.column_stack([problem.current(), token]))


def finish_numbers(placement: Placement, problem: Problem) -> Resolution:
    """Keep the appended level unless no SID has a second item and no published table has it."""
    codes: IntArray = placement.codes
    depth = problem.codes.shape[1]
    has_level = problem.published is not None and problem.published.shape[1] > depth
    sizes = problem.codebook_sizes
    if not has_level and not codes[:, depth].any():
        codes = codes[:, :depth]
    else:
        sizes = (*sizes, int(codes[:, depth].max(initial=0)) + 1)
    return Resolution(codes, sizes)


def _published_numbers(problem: Problem) -> Int64Array:
    """Number of each published item, -1 for new ones; int64 [N]."""
    depth = problem.codes.shape[1]
    if problem.published is None or problem.published.shape[1] == depth:
        return np.where(problem.is_published, 0, -1).astype(np.int64)
    return np.where(problem.is_published, problem.published[:, depth], -1).astype(np.int64)
