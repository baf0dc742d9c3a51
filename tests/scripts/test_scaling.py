"""Exponents between two sizes of the scale run, and what its projection says that it leaves out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of `scripts/`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def run(items: int, interactions: int, seconds: float) -> dict[str, Any]:
    """One size with a stage that reads interactions and one that does not."""
    mib = {"driver_rss_mib": 500, "largest_worker_own_mib": 100, "object_store_mib": 0}
    stage = {"seconds": seconds, "cpu_seconds": seconds, "spilled_mib": 0, **mib}
    rows = {"items": items, "interactions": interactions}
    return {
        "items": items,
        "window": 5,
        "rows": rows,
        "start_s": 0.0,
        "start_cpu_s": 0.0,
        "stages": {"cut": stage, "score": stage},
    }


@pytest.mark.parametrize(
    ("items", "interactions", "cut", "score"),
    [
        (1_000, 100_000, 1.0, 1.0),
        (10_000, 1_000_000, 0.5, 1.0),
        (100_000, 10_000, 0.5, 0.5),
        (100_000, 10_006, 0.5, 0.5),
        (1_000, 10_006, None, None),
        (1_000, 9_990, None, None),
    ],
)
def test_an_exponent_is_of_what_grew(
    script: Callable[[str], Any],
    items: int,
    interactions: int,
    cut: float | None,
    score: float | None,
) -> None:
    runs = [run(1_000, 10_000, 10), run(items, interactions, 100)]
    found = {row["stage"]: row for row in script("scaling.growth").growth(runs)}
    assert (found["cut"]["seconds"], found["score"]["seconds"]) == (cut, score)
    assert found["score"]["driver_rss"] == (None if score is None else 0)


@pytest.mark.parametrize(("windows", "is_said"), [((0, 0), True), ((5, 0), True), ((5, 5), False)])
def test_the_total_says_what_it_leaves_out(
    script: Callable[[str], Any], windows: tuple[int, int], is_said: bool
) -> None:
    runs = [
        {**run(10**number, 10**number, 50), "window": one}
        for number, one in enumerate(windows, start=3)
    ]
    projected = script("scaling.cluster").projection(runs)
    text = script("scale_table").projection({"sizes": runs, "projection": projected})
    assert "without training" in text
    assert ("pairs.window=0" in text) == is_said
    assert [row["grows_with"] for row in projected["stages"]] == ["interactions", "items"]
