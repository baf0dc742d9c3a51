from __future__ import annotations

import itertools

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.config import canonical_json
from forge_ray.errors import ConfigError
from forge_ray.sweep.plan import cap_plan, extend_plan, quasi_random_points
from forge_ray.sweep.space import apply_point, label_point, parse_space
from forge_ray.sweep.study import make_sampler

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


COMPONENTS = parse_space(
    {
        "sid.vectors.behaviour.alpha": {"choice": [0.0, 0.5]},
        "sid.quantizer": {
            "component": {
                "rq_kmeans": {
                    "sizes": {
                        "schedule": {"levels": [2, 4], "first": [64, 16], "ratio": [0.5, 1.0]}
                    },
                },
                "rq_vae": {
                    "levels": {"int": [3, 4]},
                    "codebook_size": {"choice": [64, 256]},
                    "alignment": {
                        "component": {"none": {}, "forge_i2i": {"weight": {"value": 0.1}}}
                    },
                    "lr": {"log": [1e-3, 1e-2], "num": 2, "when": {"levels": 3}},
                    "max_steps": {
                        "choice": [100, 200],
                        "when": {"sid.vectors.behaviour.alpha": 0.5},
                    },
                },
                "fsq": None,
            },
            "when": {"sid.vectors.behaviour.alpha": [0.0, 0.5]},
        },
        "sid.resolver.kind": {"choice": ["bucket", "zcr"], "when": {"sid.quantizer.kind": "fsq"}},
    }
)


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
        study.enqueue_trial(SPACE.optuna_values(point))
        trial = study.ask()
        assert SPACE.suggest(trial) == point
        assert trial.params == SPACE.optuna_values(point)


def test_components_bring_their_own_sub_spaces() -> None:
    points = list(COMPONENTS.grid())
    by_kind = {
        kind: [one for one in points if one["sid.quantizer.kind"] == kind]
        for kind in ("rq_kmeans", "rq_vae", "fsq")
    }
    lists = {2: 4, 3: 4, 4: 4}
    assert len(by_kind["rq_kmeans"]) == 2 * sum(lists.values())
    # levels 3 has two rates, levels 4 none; alpha .5 has two lengths.
    assert len(by_kind["rq_vae"]) == (1 + 2) * 2 * 2 * (2 + 1)
    assert len(by_kind["fsq"]) == 2 * 2
    aligned = [one for one in points if one.get("sid.quantizer.alignment.kind") == "forge_i2i"]
    assert {one["sid.quantizer.alignment.weight"] for one in aligned} == {0.1}
    assert all(("sid.quantizer.lr" in x) == (x["sid.quantizer.levels"] == 3) for x in aligned)
    assert {one["sid.quantizer.levels"] for one in by_kind["rq_vae"]} == {3, 4}
    # One name, two ranges: Optuna sees two parameters.
    labels = [one.label for one in COMPONENTS.parameters]
    assert len(set(labels)) == len(labels)
    assert {"sid.quantizer.levels[rq_kmeans]", "sid.quantizer.levels[rq_vae]"} <= set(labels)


def test_a_schedule_makes_sizes_by_level() -> None:
    schedule = {"levels": [1, 3], "first": [512, 20], "ratio": [0.5, 1.0], "min_size": 8}
    space = parse_space({"q.sizes": {"schedule": schedule}})
    points = list(space.grid())
    assert {"q.levels": 3, "q.sizes": [512, 256, 128]} in points
    assert {"q.levels": 3, "q.sizes": [20, 10, 8]} in points
    # One level: both ratios make the same list, which counts once.
    assert [one["q.sizes"] for one in points if one["q.levels"] == 1] == [[512], [20]]
    assert not space.contains({"q.levels": 3, "q.sizes": [512, 256]})
    assert not space.contains({"q.levels": 2, "q.sizes": [512, 255]})
    assert space.optuna_values({"q.levels": 2, "q.sizes": [20, 10]}) == {
        "q.levels": 2,
        "q.sizes.first": 20,
        "q.sizes.ratio": 0.5,
    }
    grows = parse_space({"q.sizes": {"schedule": {"levels": 2, "first": [8], "ratio": [4]}}})
    assert list(grows.grid()) == [{"q.levels": 2, "q.sizes": [8, 32]}]


@pytest.mark.parametrize("space", [SPACE, COMPONENTS], ids=["flat", "components"])
def test_all_samplers_agree_on_what_a_point_is(space) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask()) for _ in range(40)]
    planned = list(itertools.islice(quasi_random_points(space, seed=3), 40))
    for point in (*space.grid(), *drawn, *planned):
        assert space.contains(point)
        # Optuna's parameters give the point again, and no parameter is left over.
        values = space.optuna_values(point)
        fixed = optuna.trial.FixedTrial(values)
        assert space.suggest(fixed) == point
        assert fixed.params == values
        assert not space.contains({**point, "other": 1})
        missing = dict(list(point.items())[:-1])
        assert not space.contains(missing)


def test_every_sampler_of_optuna_takes_conditional_components() -> None:
    for kind in ("tpe", "gp", "nsga2"):
        study = optuna.create_study(sampler=make_sampler(kind, seed=1), direction="maximize")
        for number in range(12):
            trial = study.ask()
            assert COMPONENTS.contains(COMPONENTS.suggest(trial))
            study.tell(trial, number / 12)


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


@pytest.mark.parametrize("limit", [3, 4, 9])
def test_a_plan_holds_no_more_than_the_most_trials(limit: int) -> None:
    small = parse_space({"k": {"int": [1, 6]}})
    points = [{"k": number} for number in range(1, 9)]
    began = {canonical_json(one) for one in points[:2]}
    # Seven and eight are new: they go before what merely waits.
    expected = {3: [1, 2, 7], 4: [1, 2, 7, 8], 9: [*range(1, 9)]}
    found = cap_plan(points, started=began, previous=small, limit=limit)
    assert [one["k"] for one in found] == expected[limit]
    # What began stays, however low the number is set.
    assert cap_plan(points, started=began, previous=small, limit=1) == points[:2]
    assert cap_plan(points, started=(), previous=None, limit=2) == points[:2]


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
        ({"a": {"int": [1, 4], "step": 0}}, r"a\.step must be a whole number >= 1, got 0"),
        ({"a": {"int": [1, 4], "step": 1.5}}, r"a\.step must be a whole number >= 1, got 1\.5"),
        ({"a": {"float": [0, 1], "num": 0}}, r"a\.num must be a whole number >= 1, got 0"),
        ({"a": {"log": [1, 2], "num": "3"}}, r"a\.num must be a whole number >= 1, got '3'"),
        ({"a": {"float": [0, 1], "step": 2}}, "must have only float, when, num, got step"),
        ({"q": {"component": ["a", "b"]}}, "must map kinds"),
        ({"q": {"component": {"a": [1]}}}, "must map fields to entries"),
        ({"q": {"component": {"a": {"x": 3}}}}, r"space.q.x \(a\) must have one of"),
        ({"q.kind": {"choice": ["a"]}, "q": {"component": {"a": {}}}}, "space.q.kind .* once"),
        (
            {"q.x": {"int": [1, 2]}, "q": {"component": {"a": {"x": {"int": [1, 2]}}}}},
            "must be given once",
        ),
        ({"q": {"component": {"a": {"x": {"value": 1, "when": {"y": 1}}}}}}, "parameter above it"),
        ({"s": {"schedule": {"first": [8]}}}, "must have levels and first"),
        ({"s": {"schedule": {"levels": 2, "first": [1]}}}, "first and min_size >= 2"),
        ({"s": {"schedule": {"levels": 2, "first": [8], "ratio": [0]}}}, "ratio > 0"),
        ({"s": {"schedule": {"levels": 2, "first": 8}}}, "schedule.first must be a list"),
        (
            {"q.levels": {"int": [2, 3]}, "q.sizes": {"schedule": {"levels": 2, "first": [8]}}},
            "space.q.levels must be given once",
        ),
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
