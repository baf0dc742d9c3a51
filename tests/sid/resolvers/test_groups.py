"""Runs of an ordered array, across the borders of the blocks that they are counted in."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.sid.resolvers import groups


@pytest.mark.parametrize("seed", range(30))
def test_summary_equals_counting(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_ROWS_AT_ONCE", 5)
    rng = np.random.default_rng(seed)
    ordered = np.sort(rng.integers(0, rng.integers(1, 12), size=rng.integers(0, 40)))
    _, counts = np.unique(ordered, return_counts=True)
    found = groups.summarize_runs(ordered)
    assert (found.count, found.longest) == (len(counts), counts.max(initial=0))
