"""The figures of curves, against definitions that are slow and plain."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.errors import ConfigError
from forge_ray.gr.convergence import Point, first_reached, gap_area, mean_curve, summarize


def curve(
    values: list[float], references: list[float], *, phase: str = "online", every: int = 10
) -> list[Point]:
    return [
        Point(
            phase=phase,
            stage=1,
            steps=number * every,
            tokens=number * every * 100,
            value=value,
            reference=reference,
        )
        for number, (value, reference) in enumerate(zip(values, references, strict=True))
    ]


def random_curve(seed: int) -> list[Point]:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 12))
    return curve(rng.random(size).tolist(), rng.random(size).tolist())


@pytest.mark.parametrize("seed", range(20))
def test_the_gap_is_the_area_between_the_lines(seed: int) -> None:
    points = random_curve(seed)
    steps = [point.steps for point in points]
    fine = np.linspace(0, steps[-1], 100_001)
    ours = np.interp(fine, steps, [point.value for point in points])
    theirs = np.interp(fine, steps, [point.reference for point in points])
    assert gap_area(points) == pytest.approx(float(np.mean(theirs - ours)) * steps[-1], abs=1e-3)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("share", "hold"), [(1.0, 1), (0.5, 2), (0.8, 3)])
def test_the_first_point_there_is_the_first_from_which_all_are(
    seed: int, share: float, hold: int
) -> None:
    points = random_curve(seed)
    brute = [
        start
        for start in range(len(points))
        if start + hold <= len(points)
        and min(p.value - share * p.reference for p in points[start : start + hold]) >= 0
    ]
    assert first_reached(points, share=share, hold=hold) == (brute[0] if brute else None)


def test_offline_steps_count_in_the_total_alone() -> None:
    offline = curve([0.0, 0.2, 0.4], [0.4] * 3, phase="offline", every=5)
    online = curve([0.2, 0.3, 0.6], [0.5] * 3)
    found = summarize([*offline, *online], share=1.0, hold=1)
    assert found.reached is not None
    assert (found.reached.steps, found.reached.total_steps) == (20, 30)
    assert (found.reached.tokens, found.reached.total_tokens) == (2000, 3000)
    assert found.gap_online == pytest.approx(10 * 0.25 + 10 * 0.05)
    assert found.gap_total == pytest.approx(found.gap_online + 5 * 0.3 + 5 * 0.1)
    assert (found.steps, found.total_steps) == (20, 30)
    assert (found.first, found.last) == (0.2, 0.6)


def test_a_curve_that_never_arrives_says_so() -> None:
    found = summarize(curve([0.1, 0.2], [0.5, 0.5]), share=1.0, hold=1)
    assert found.reached is None
    assert found.gap_total == found.gap_online


def test_an_old_model_that_finds_nothing_is_reached_by_nobody() -> None:
    found = summarize(curve([0.0, 0.0, 0.2], [0.0, 0.0, 0.1]), share=1.0, hold=1)
    assert found.reached is not None
    assert found.reached.steps == 20


def test_the_mean_is_taken_point_by_point_and_only_of_equal_points() -> None:
    one, two = curve([0.0, 0.2], [0.1, 0.1]), curve([0.2, 0.6], [0.3, 0.5])
    mean = mean_curve([one, two])
    assert [point.value for point in mean] == pytest.approx([0.1, 0.4])
    assert [point.reference for point in mean] == pytest.approx([0.2, 0.3])
    with pytest.raises(ConfigError, match="seeds must be measured at the same steps"):
        mean_curve([one, two[:1]])
