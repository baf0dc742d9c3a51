from __future__ import annotations

import itertools

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.config import canonical_json
from forge_ray.errors import ConfigError
from forge_ray.sweep.plan import extend_plan, quasi_random_points
from forge_ray.sweep.space import apply_point, label_point, optuna_values, parse_space

DEFINITION = {
    "sid.quantizer.kind": {"choice": ["rq_kmeans", "rq_vae"]},
    "sid.quantizer.levels": {"int": [2, 4]},
    "sid.quantizer.sizes": {"choice": [None, [64, 32]]},
    "sid.quantizer.i2i": {"choice": [True, False], "when": {"sid.quantizer.kind": "rq_vae"}},
    "sid.quantizer.weight": {
        "log": [1e-4, 1.0],
        "num": 3,
        "when": {"sid.quantizer.kind": "rq_vae", "sid.quantizer.i2i": [True]},
    },
    "gr.dropout": {"float": [0.0, 0.5], "num": 2},
}
SPACE = parse_space(DEFINITION)


def names(points) -> list[str]:
    return [canonical_json(point) for point in points]


def test_grid_enumerates_every_branch_once() -> None:
    points = list(SPACE.grid())
    kmeans, vae = 3 * 2 * 2, 3 * 2 * 2 * (3 + 1)
    assert len(points) == kmeans + vae
    assert len(set(names(points))) == len(points)
    assert all(SPACE.contains(point) for point in points)
    assert points == list(SPACE.grid())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=6, max_size=6))
def test_unit_cube_gives_points_of_the_space(units) -> None:
    point = SPACE.at(units)
    assert SPACE.contains(point)
    assert ("sid.quantizer.i2i" in point) == (point["sid.quantizer.kind"] == "rq_vae")


def test_suggest_records_and_replays_points_in_optuna() -> None:
    study = optuna.create_study()
    for point in itertools.islice(quasi_random_points(SPACE, seed=3), 8):
        study.enqueue_trial(optuna_values(point))
        trial = study.ask()
        assert SPACE.suggest(trial) == point
        assert trial.params == optuna_values(point)


def test_quasi_random_prefix_is_stable_and_distinct() -> None:
    short = list(itertools.islice(quasi_random_points(SPACE, seed=1), 70))
    long = list(itertools.islice(quasi_random_points(SPACE, seed=1), 200))
    assert short == long[:70]
    assert len(set(names(long))) == 200
    assert short != list(itertools.islice(quasi_random_points(SPACE, seed=2), 70))


def test_quasi_random_ends_where_a_small_space_runs_dry() -> None:
    space = parse_space({"a": {"choice": [1, 2]}, "b": {"int": [0, 2]}})
    assert len(list(quasi_random_points(space, seed=0))) == 6


@pytest.mark.parametrize("kind", ["grid", "quasi_random"])
def test_new_value_adds_only_points_that_use_it(kind: str) -> None:
    small = parse_space({"k": {"choice": [64, 128]}, "l": {"int": [2, 4]}})
    large = parse_space({"k": {"choice": [64, 128, 256]}, "l": {"int": [2, 4]}})

    def points(space):
        return space.grid() if kind == "grid" else quasi_random_points(space, seed=5)

    limit = None if kind == "grid" else 5
    first = extend_plan(planned=[], previous=None, candidates=points(small), limit=limit)
    second = extend_plan(planned=first, previous=small, candidates=points(large), limit=limit)
    assert second[: len(first)] == first
    added = second[len(first) :]
    assert added
    assert all(point["k"] == 256 for point in added)
    # The same file again adds nothing.
    third = extend_plan(planned=second, previous=large, candidates=points(large), limit=limit)
    assert third == second


def test_larger_budget_continues_the_sequence() -> None:
    first = extend_plan(
        planned=[], previous=None, candidates=quasi_random_points(SPACE, seed=5), limit=4
    )
    more = extend_plan(
        planned=first, previous=SPACE, candidates=quasi_random_points(SPACE, seed=5), limit=9
    )
    assert more == list(itertools.islice(quasi_random_points(SPACE, seed=5), 9))


def test_apply_point_sets_nested_values_and_keeps_the_base() -> None:
    base = {"sid": {"quantizer": {"levels": 3}}}
    merged = apply_point(base, {"sid.quantizer.kind": "random", "gr.lr": 0.1})
    assert merged == {"sid": {"quantizer": {"levels": 3, "kind": "random"}}, "gr": {"lr": 0.1}}
    assert base == {"sid": {"quantizer": {"levels": 3}}}
    with pytest.raises(ConfigError, match="must lead through mappings"):
        apply_point(base, {"sid.quantizer.levels.deep": 1})


def test_label_is_one_short_line() -> None:
    assert label_point({"sid.quantizer.kind": "rq_vae", "gr.lr": 0.00123456}) == (
        "rq_vae lr=0.00123"
    )
    deep = {"sid.quantizer.levels": 3, "sid.vectors.behaviour.alpha": 0.5}
    assert label_point(deep) == "levels=3 behaviour.alpha=0.5"


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({"a": 3}, "must have one of"),
        ({"a": {"choice": [1], "int": [1, 2]}}, "must have one of"),
        ({"a": {"choice": []}}, "list of values"),
        ({"a": {"choice": [1, 1]}}, "must not repeat"),
        ({"a": {"int": [3, 1]}}, "low <= high"),
        ({"a": {"int": [1.5, 3]}}, "whole ends"),
        ({"a": {"log": [0, 1]}}, "0 < low"),
        ({"a": {"float": [0, "x"]}}, r"\[low, high\]"),
        ({"a": {"choice": [1], "size": 2}}, "must have only"),
        ({"a": {"float": [0, 1], "step": 2}}, "must have only float, when, num, got step"),
        ({"a": {"choice": [1], "when": {"b": 1}}, "b": {"choice": [1]}}, "parameter above it"),
    ],
)
def test_bad_definitions_are_refused(definition, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space(definition)


def test_float_grid_needs_a_number_of_points() -> None:
    with pytest.raises(ConfigError, match="num must be set"):
        list(parse_space({"a": {"float": [0, 1]}}).grid())


def test_choices_tell_true_from_one() -> None:
    space = parse_space({"a": {"choice": [1, True]}})
    assert [type(point["a"]) for point in space.grid()] == [int, bool]
