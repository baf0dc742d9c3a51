"""The order of trials, decided before they run (grid, quasi-random), and how a plan grows.

A plan is a function of the space, the seed and the plan before it, never of results or timing, so a
killed sweep and an uninterrupted one end with the same trials. Adding a value to the space keeps
every planned point and adds those that use the new value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from scipy.stats import qmc

from forge_ray.config import canonical_json
from forge_ray.sweep.space import Point, Space

_MAX_DRAWS = 1 << 14


def quasi_random_points(space: Space, *, seed: int) -> Iterator[Point]:
    """Distinct points of a scrambled Sobol sequence; a longer run extends a shorter one.

    Source: Sobol' 1967 with Owen's scrambling, `scipy.stats.qmc.Sobol`. Small spaces run dry: the
    sequence ends after 2^14 draws.
    """
    if not space.parameters:
        yield {}
        return
    sequence = qmc.Sobol(d=len(space.parameters), scramble=True, rng=seed)
    seen: set[str] = set()
    drawn, size = 0, 64
    while drawn < _MAX_DRAWS:
        # Powers of two keep the sequence balanced; the draws continue where the last block ended.
        for units in sequence.random(size):
            point = space.at([float(unit) for unit in units])
            name = canonical_json(point)
            if name not in seen:
                seen.add(name)
                yield point
        drawn, size = drawn + size, max(drawn, size)


def extend_plan(
    *,
    planned: Sequence[Point],
    previous: Space | None,
    candidates: Iterator[Point],
    limit: int | None,
) -> list[Point]:
    """The points to run: those planned before, then what the space gained, up to the limit.

    Args:
        planned: Points of the plan so far, in order; all belong to the current space.
        previous: Space of the plan so far, None for a first plan.
        candidates: Points of the current space in search order.
        limit: How many candidates to consider, and how many points a space that did not grow may
            have; None for all.

    Returns:
        `planned`, then candidates outside the previous space, then others up to `limit`.
    """
    points = list(planned)
    names = {canonical_json(point) for point in points}
    budget = math.inf if limit is None else limit
    considered = list(itertools.islice(candidates, limit))
    is_new = [previous is not None and not previous.contains(point) for point in considered]
    for wanted in (True, False):
        for point, new in zip(considered, is_new, strict=True):
            name = canonical_json(point)
            if new is wanted and name not in names and (new or len(points) < budget):
                names.add(name)
                points.append(point)
    return points
