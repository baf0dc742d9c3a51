"""Shares of a mixture, and the settings that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.gr.config import GrConfig
from forge_ray.gr.tasks import TASKS, Prompts, TasksConfig, history_beside


def test_without_other_tasks_every_row_is_a_history():
    assert TasksConfig().shares(64) == {"next_item": 64}
    assert not TasksConfig().text_tasks


@given(st.lists(st.floats(0, 5), min_size=5, max_size=5), st.integers(5, 300))
def test_shares_fill_the_batch_in_proportion(weights, rows):
    if not sum(weights):
        return
    config = TasksConfig(queries="q", **dict(zip(TASKS, weights, strict=True)))
    shares = config.shares(rows)
    assert sum(shares.values()) == rows
    assert list(shares) == [task for task in TASKS if config.weights[task]]
    exact = {task: rows * config.weights[task] / sum(weights) for task in shares}
    lifted = sum(one < 1 for one in exact.values())
    for task, share in shares.items():
        assert share >= 1
        assert (
            share == 1 if exact[task] < 1 and share <= 1 else abs(share - exact[task]) < 1 + lifted
        )


def test_shares_are_those_of_the_weights_also_in_small_batches():
    assert TasksConfig(next_item=9, item_to_sid=1).shares(10) == {"next_item": 9, "item_to_sid": 1}
    assert TasksConfig(item_to_sid=0.01).shares(256) == {"next_item": 253, "item_to_sid": 3}
    assert TasksConfig(item_to_sid=0.001).shares(64) == {"next_item": 63, "item_to_sid": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.next_item=-1"], "weights >= 0"),
        (["tasks.next_item=0"], "one above"),
        (["tasks.search=1"], "tasks.queries must name"),
        (["tasks.validate=search"], "tasks.queries must name"),
        (["tasks.validate=search", "tasks.queries=q"], "no query is learned"),
        (["tasks.max_tokens=0"], "tasks.max_tokens"),
        (["tasks.search_prompt='{query}'"], "{history} and {query}"),
        (["tasks.item_prompt='{text} {text}'"], "{text} once"),
        (["tasks.text_prompt='{item'"], "must be a template"),
        (["tasks.item_to_sid=1"], "model.kind=decoder, which reads no text"),
    ],
)
def test_settings_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(GrConfig, overrides=overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_heads=0"], "model.num_heads must be >= 1"),
        (["model.hidden_size=0"], "model.hidden_size must be >= 1"),
        (["model.kind=rq_transformer", "model.num_heads=-1"], "model.num_heads must be >= 1"),
        (["model.kind=parallel_heads", "model.num_layers=0"], "model.num_layers must be >= 1"),
        (["model.kind=t5", "model.max_distance=8"], "model.max_distance above half of it"),
        (["seed=10000000000000000"], "seed must be in"),
        (["max_failures=-1"], "max_failures must be >= 0"),
        (["validation.ks=[10,0]"], "validation.ks must be >= 1"),
    ],
)
def test_values_that_no_training_can_have(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(GrConfig, overrides=overrides)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, Prompts(histories=True, queries=False, beside=False)),
        ({"search": 1}, Prompts(histories=True, queries=True, beside=True)),
        ({"query_to_sid": 1}, Prompts(histories=True, queries=True, beside=False)),
        ({"search": 1, "query_to_sid": 2}, Prompts(histories=True, queries=True, beside=True)),
        ({"next_item": 0, "query_to_sid": 1}, Prompts(histories=False, queries=True, beside=False)),
        ({"next_item": 0, "item_to_sid": 1}, Prompts(histories=False, queries=False, beside=False)),
    ],
)
def test_a_model_is_asked_as_it_was_trained(weights, expected):
    assert TasksConfig(queries="q", **weights).prompts == expected


def test_only_the_search_task_has_histories_beside_queries():
    assert [history_beside(task, 20) for task in ("search", "query_to_sid")] == [20, 0]


def test_questions_that_no_training_row_had():
    TasksConfig().prompts.check(has_queries=False)
    with pytest.raises(ConfigError, match=r"tasks\.query_to_sid, got old, which was not"):
        TasksConfig(item_to_sid=1).prompts.check(has_queries=True, model="old")
    alone = TasksConfig(next_item=0, query_to_sid=1, queries="q").prompts
    alone.check(has_queries=True)
    with pytest.raises(ConfigError, match=r"new must be asked with queries.*users without"):
        alone.check(has_queries=False, model="new")
    with pytest.raises(ConfigError, match="got none of them"):
        TasksConfig(next_item=0, item_to_sid=1).prompts.check(has_queries=False)


def test_results_of_other_questions_have_another_identity():
    both, alone = Prompts(queries=True, beside=True), Prompts(queries=True)
    assert both.identity(has_queries=True) == alone.identity(has_queries=False) == {}
    assert alone.identity(has_queries=True) == {"asks": "query"}


def test_weights_are_chosen_by_a_task_that_is_learned():
    TasksConfig().check_validation()
    TasksConfig(next_item=0, search=1, queries="q", validate="search").check_validation()
    for one in ({"search": 1, "queries": "q"}, {"item_to_sid": 1}):
        with pytest.raises(ConfigError, match=r"validate must be .* got next_item with"):
            TasksConfig(next_item=0, **one).check_validation()


def test_a_batch_below_the_tasks_is_refused():
    with pytest.raises(ConfigError, match="global_batch must be >= 3"):
        TasksConfig(item_to_sid=1, sid_to_text=1).shares(2)


def test_a_training_on_histories_is_what_it_was():
    """Models that were published before there were mixtures keep their keys."""
    assert "tasks" not in load_config(GrConfig, overrides=["tasks.column=brand"]).identity()
    mixed = GrConfig(
        model=load_config(GrConfig, overrides=["model.kind=pretrained_decoder"]).model,
        tasks=TasksConfig(item_to_sid=0.5),
    )
    assert mixed.identity()["tasks"]["item_to_sid"] == 0.5
