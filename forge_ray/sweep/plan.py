"""The order of trials, decided before they run (grid, quasi-random), and how a plan grows.

A plan is a function of the space, the seed and the plan before it, never of results or timing, so a
killed sweep and an uninterrupted one end with the same trials. Adding a value to the space keeps
every planned point and adds those that use the new value.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from scipy.stats import qmc

from forge_ray.config import canonical_json
from forge_ray.errors import ConfigError
from forge_ray.sweep.config import DRAWING, SweepConfig
from forge_ray.sweep.searcher import Rejection, Resolve
from forge_ray.sweep.space import Point, Space, parse_space

logger = logging.getLogger(__name__)

PLAN = "plan.json"
"""The plan of the sessions so far, in the sweep's folder."""
_MAX_DRAWS = 1 << 14
PATIENCE = 512
"""Rejections in a row after which a sequence of designs is given up."""


class Sieve:
    """Lets the designs through that may become trials, and counts those that may not."""

    rejections: Counter[str]
    """Designs by the rule that they broke."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._last: Rejection | None = None
        self.rejections = Counter()

    def passes(self, point: Point) -> bool:
        """Whether a design may become a trial."""
        rejected = self._resolve(point).rejected
        if rejected is not None:
            self._last = rejected
            self.rejections[rejected.rule] += 1
        return rejected is None

    def passing(self, points: Iterable[Point], *, patience: int | None) -> Iterator[Point]:
        """The designs that pass; ends after so many rejections in a row, None never."""
        in_a_row = 0
        for point in points:
            if self.passes(point):
                in_a_row = 0
                yield point
                continue
            in_a_row += 1
            if in_a_row == patience:
                return

    def require_some(self, passed: bool) -> None:
        """Refuses a space whose every design was rejected.

        Raises:
            ConfigError: Nothing passed, though there were designs.
        """
        if passed or self._last is None:
            return
        counts = describe_rejections(self.rejections)
        raise ConfigError(
            f"space must hold a design that may run, got none: {counts}, "
            f"the last because {self._last.reason}. Widen the space, or relax constraints or "
            "gate.min_capacity."
        )


def check_space(space: Space, resolve: Resolve, *, draws: int) -> None:
    """Resolves some designs of a space that will be drawn from: mistakes end before any work.

    Raises:
        ConfigError: A design is no valid configuration, or every one was rejected.
    """
    if not space.parameters:
        return
    sieve, points = Sieve(resolve), quasi_random_points(space, seed=0)
    passed = [sieve.passes(point) for point in itertools.islice(points, draws)]
    rest = sieve.passing(points, patience=PATIENCE)
    sieve.require_some(any(passed) or next(rest, None) is not None)


def describe_rejections(rejections: Counter[str]) -> str:
    """Counts in words: `12 designs rejected (8 capacity, 4 max_sid_bits)`."""
    parts = ", ".join(f"{count} {rule}" for rule, count in rejections.most_common())
    return f"{rejections.total()} designs rejected ({parts})"


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


def cap_plan(
    points: Sequence[Point], *, started: Collection[str], previous: Space | None, limit: int
) -> list[Point]:
    """Those of a plan that fit into a number of trials, in their order.

    Trials that began are trials; then come points that the space gained, since somebody asked for
    them last, then those that were planned before.

    Args:
        points: The plan.
        started: Names of the points of the space that began, in the plan or drawn.
        previous: Space of the plan before, None for a first plan.
        limit: Trials in all.
    """
    waiting = [one for one in points if canonical_json(one) not in started]
    is_old = [previous is None or previous.contains(one) for one in waiting]
    room = max(0, limit - len(started))
    chosen = sorted(range(len(waiting)), key=is_old.__getitem__)[:room]
    kept = {*started, *(canonical_json(waiting[place]) for place in chosen)}
    return [one for one in points if canonical_json(one) in kept]


def make_plan(
    config: SweepConfig,
    space: Space,
    folder: Path,
    sieve: Sieve,
    *,
    first: Sequence[Point] = (),
    started: Iterable[Point] = (),
) -> list[Point]:
    """The points of the space to run before anything is drawn, in order; writes nothing.

    Fixed points come before them. A plan keeps what began and grows: see `extend_plan`; what lies
    beyond `num_trials` and did not begin is left out, and comes back with a larger number.

    Args:
        config: The sweep file.
        space: Its space.
        folder: Where the plan of earlier sessions is.
        sieve: Which designs may be trials.
        first: Points of the space to plan before those of grid or sequence.
        started: Points of the trials that began.

    Raises:
        ConfigError: A point is no valid configuration, or every one was rejected.
    """
    previous, kept = _previous_plan(folder / PLAN, space)
    limit = None if config.num_trials is None else max(0, config.num_trials - len(config.points))
    is_grid = config.sampler.kind == "grid"
    plan = extend_plan(
        planned=[point for point in kept if sieve.passes(point)],
        previous=previous,
        candidates=sieve.passing(
            itertools.chain(first, _candidates(config, space, previous)),
            patience=None if is_grid else PATIENCE,
        ),
        limit=limit,
    )
    if config.sampler.kind not in DRAWING:
        sieve.require_some(bool(plan))
    if limit is None:
        return plan
    fixed = {canonical_json(point) for point in config.points}
    began = {canonical_json(point) for point in started if space.contains(point)} - fixed
    capped = cap_plan(plan, started=began, previous=previous, limit=limit)
    if len(capped) < len(plan):
        logger.info(
            "num_trials=%d leaves out %d planned designs; raise it to run them",
            config.num_trials,
            len(plan) - len(capped),
        )
    return capped


def _previous_plan(path: Path, space: Space) -> tuple[Space | None, list[Point]]:
    if not path.exists():
        return None, []
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = [point for point in content["points"] if space.contains(point)]
    return parse_space(content["space"]), kept


def _candidates(config: SweepConfig, space: Space, previous: Space | None) -> Iterator[Point]:
    sampler = config.sampler
    if not space.parameters:
        return iter(())
    if sampler.kind == "grid":
        return space.grid()
    points = quasi_random_points(space, seed=sampler.seed)
    if sampler.kind == "quasi_random":
        return points
    # Optuna draws its points; only what the space gained is planned, so that it gets tried at all.
    considered = itertools.islice(points, config.num_trials)
    return (one for one in considered if previous is not None and not previous.contains(one))
