"""`zcr` against every permutation of small groups; the marginals of `sinkhorn_last`."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.sid.resolvers import SinkhornLastConfig, ZcrConfig, assignment
from forge_ray.sid.resolvers.sinkhorn_last import log_plan
from tests.sid.resolvers.plain import Catalogue, fewest_changes, occupancy

CASE = st.builds(Catalogue.draw, st.integers(0, 2**32 - 1), st.integers(1, 16), st.just((2, 2, 5)))


@settings(max_examples=100)
@given(CASE)
def test_zcr_changes_as_little_as_any_assignment_could(case: Catalogue) -> None:
    result = case.resolve(ZcrConfig())
    changed: dict[tuple[int, ...], int] = defaultdict(int)
    distance: dict[tuple[int, ...], float] = defaultdict(float)
    for row, sid in enumerate(map(tuple, result.codes.tolist())):
        changed[sid[:-1]] += int(sid[-1] != case.codes[row, -1])
        distance[sid[:-1]] += float(case.distances[row, sid[-1]])
    best = fewest_changes(case)
    for prefix, (changes, total) in best.items():
        assert changed[prefix] == changes
        assert distance[prefix] == pytest.approx(total, abs=1e-6)
    prefixes = [tuple(codes[:-1]) for codes in case.codes.tolist()]
    fits = np.array([prefix in best for prefix in prefixes])
    assert np.array_equal(result.codes[~fits], case.codes[~fits])
    assert max(occupancy(result.codes[fits]).values(), default=1) == 1
    assert result.report["prefixes_too_large"] == len(set(prefixes)) - len(best)


@given(CASE, st.sampled_from([ZcrConfig(), SinkhornLastConfig(iterations=5)]))
def test_small_blocks_give_the_same_table(
    case: Catalogue, config: ZcrConfig | SinkhornLastConfig
) -> None:
    whole = case.resolve(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "_BLOCK_CELLS", 5)
        pieces = case.resolve(config)
    assert np.array_equal(pieces.codes, whole.codes)
    added = whole.report["mean_distance_added"]
    assert pieces.report["mean_distance_added"] == pytest.approx(added)


def test_the_plan_is_balanced_and_equals_the_formula() -> None:
    rng = np.random.default_rng(0)
    distances = rng.random((2, 3, 8))
    is_open = np.ones((2, 8), dtype=bool)
    is_open[1, [2, 5]] = False
    plan = np.exp(log_plan(distances, is_open, epsilon=0.3, iterations=400))
    assert plan.sum(axis=2) == pytest.approx(np.full((2, 3), 1 / 3), abs=1e-6)
    assert plan[0].sum(axis=0) == pytest.approx(np.full(8, 1 / 8))
    assert plan[1].sum(axis=0) == pytest.approx(np.where(is_open[1], 1 / 6, 0))

    # The published recipe, in plain exponentials.
    d = distances[0]
    middle = (d.max() + d.min()) / 2
    q = np.exp(-(d - middle) / (d.max() - middle + 1e-5) / 0.3)
    for _ in range(5):
        q = q / q.sum(axis=1, keepdims=True) / 3
        q = q / q.sum(axis=0, keepdims=True) / 8
    ours = np.exp(log_plan(distances[:1], is_open[:1], epsilon=0.3, iterations=5))
    assert ours[0] == pytest.approx(q)


def test_a_tiny_epsilon_stays_finite_and_the_settings_matter() -> None:
    case = Catalogue.draw(1, 90, (4, 64))
    results = {
        (epsilon, iterations): case.resolve(
            SinkhornLastConfig(epsilon=epsilon, iterations=iterations)
        ).codes
        for epsilon, iterations in [(1e-6, 50), (0.003, 50), (1.0, 50), (1.0, 1), (0.003, 1)]
    }
    for codes in results.values():
        assert max(occupancy(codes).values()) == 1
    assert not np.array_equal(results[0.003, 50], results[1.0, 50])
    assert not np.array_equal(results[0.003, 50], results[0.003, 1])


def test_balance_evens_out_the_codes_in_use() -> None:
    case = Catalogue.draw(2, 90, (8, 64))
    before = np.bincount(case.codes[:, 1], minlength=64)
    after = np.bincount(case.resolve(SinkhornLastConfig()).codes[:, 1], minlength=64)
    assert after.std() < before.std() / 2
