"""How fast a curve catches up with another: steps until it is there, and the area between the two.

Pure functions of points that both curves have. Knows no models, stages or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forge_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model in training beside the old model on the same users.

    Attributes:
        phase: `offline` before it serves, `online` after.
        stage: number from 1 of the stage that it trains on.
        steps: optimiser steps of this phase so far.
        tokens: target tokens of this phase so far.
        value: of the metric.
        reference: the old model's, on the same users.
    """

    phase: str
    stage: int
    steps: int
    tokens: int
    value: float
    reference: float


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The first point at which a curve is at the reference.

    Attributes:
        steps: online steps until there.
        total_steps: the same and the offline steps before them.
        tokens: target tokens trained on, online.
        total_tokens: the same and the offline ones.
    """

    steps: int
    total_steps: int
    tokens: int
    total_tokens: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a curve says in few numbers.

    Attributes:
        reached: None where it never is at the reference.
        gap_online: area between reference and curve over online steps, metric times steps; where
            the curve is above, it counts against.
        gap_total: the same and the area over offline steps, as if the model had served meanwhile.
        steps: online steps trained.
        total_steps: the same and the offline ones.
        first: value at the first online point.
        last: value at the last point.
    """

    reached: Reached | None
    gap_online: float
    gap_total: float
    steps: int
    total_steps: int
    first: float
    last: float


def gap_area(points: Sequence[Point]) -> float:
    """Trapezoids of (reference - value) over the steps of one phase; 0 for less than two points."""
    gaps = [point.reference - point.value for point in points]
    return float(np.trapezoid(gaps, [point.steps for point in points])) if len(gaps) > 1 else 0.0


def first_reached(points: Sequence[Point], *, share: float, hold: int) -> int | None:
    """Index of the first point from which on `hold` points in a row are at the reference.

    Args:
        points: of one phase, in the order of steps.
        share: of the reference that counts as reaching it.
        hold: points in a row; fewer at the end of the curve do not count.
    """
    # A reference of 0, an old model that finds nothing on few users, is reached by nobody.
    is_there = [point.value >= share * point.reference > 0 for point in points]
    for start in range(len(points) - hold + 1):
        if all(is_there[start : start + hold]):
            return start
    return None


def summarize(points: Sequence[Point], *, share: float, hold: int) -> Summary:
    """The figures of one curve.

    Args:
        points: offline ones, if any, before online ones; each in the order of steps.
        share: see `first_reached`.
        hold: see `first_reached`.
    """
    online = [point for point in points if point.phase == "online"]
    offline = [point for point in points if point.phase == "offline"]
    steps = offline[-1].steps if offline else 0
    tokens = offline[-1].tokens if offline else 0
    at = first_reached(online, share=share, hold=hold)
    reached = None
    if at is not None:
        there = online[at]
        reached = Reached(
            steps=there.steps,
            total_steps=there.steps + steps,
            tokens=there.tokens,
            total_tokens=there.tokens + tokens,
        )
    gap = gap_area(online)
    return Summary(
        reached=reached,
        gap_online=gap,
        gap_total=gap + gap_area(offline),
        steps=online[-1].steps,
        total_steps=online[-1].steps + steps,
        first=online[0].value,
        last=online[-1].value,
    )


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of the curves of several seeds, point by point.

    Raises:
        ConfigError: the curves have different points.
    """
    places = [[(one.phase, one.stage, one.steps) for one in curve] for curve in curves]
    if any(one != places[0] for one in places):
        raise ConfigError(
            "seeds must be measured at the same steps, got other points. Give all of them one "
            "configuration."
        )
    return [
        Point(
            phase=same[0].phase,
            stage=same[0].stage,
            steps=same[0].steps,
            tokens=round(float(np.mean([one.tokens for one in same]))),
            value=float(np.mean([one.value for one in same])),
            reference=float(np.mean([one.reference for one in same])),
        )
        for same in zip(*curves, strict=True)
    ]
