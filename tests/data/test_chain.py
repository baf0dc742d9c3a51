"""Stages of one split are found from any one of them, and only those that were prepared with it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from forge_ray.artifacts import ArtifactInfo, ArtifactStore
from forge_ray.data.chain import TOGETHER, stage_chain
from forge_ray.errors import ConfigError


def put(
    store: ArtifactStore,
    name: str,
    days: tuple[int, int, int],
    *,
    together: Sequence[str] | None = None,
    **options: Any,
) -> str:
    """A dataset manifest without content; one of old names no stages."""
    config = config_of(days, **options)
    metrics = {} if together is None else {TOGETHER: list(together)}
    info = ArtifactInfo(metrics=metrics)
    built = store.build("dataset", name, config, parents=["log"], produce=lambda writer: info)
    return built.key


def config_of(days: tuple[int, int, int], **options: Any) -> dict[str, Any]:
    stage = dict(zip(("first", "end", "held_out_end"), days, strict=True))
    return {"split": {"kind": "temporal", "validation_share": 0.5, **options}, "stage": stage}


def week(number: int) -> tuple[int, int, int]:
    return number * 7, number * 7 + 7, number * 7 + 8


def keys_of(numbers: Sequence[int]) -> list[str]:
    return [ArtifactStore.key("dataset", config_of(week(n)), ["log"]) for n in numbers]


def prepared(store: ArtifactStore, numbers: Sequence[int]) -> list[str]:
    """One call's stages; those that are there stay what they are."""
    keys = keys_of(numbers)
    assert [put(store, f"toy-s{n}", week(n), together=keys) for n in numbers] == keys
    return keys


def chain_of(store: ArtifactStore, key: str) -> list[str]:
    return [one.key for one in stage_chain(store, key)]


def test_another_call_changes_no_chain(store: ArtifactStore) -> None:
    two = prepared(store, (3, 4))
    assert [chain_of(store, key) for key in two] == [two, two]
    four = prepared(store, (1, 2, 3, 4))
    assert four[2:] == two
    assert [chain_of(store, key) for key in four] == [four, four, two, two]


def test_a_stage_that_was_prepared_alone_belongs_to_the_first_others(store: ArtifactStore) -> None:
    (alone,) = prepared(store, (3,))
    with pytest.raises(ConfigError, match="got none that was prepared with it"):
        stage_chain(store, alone)
    several = prepared(store, (2, 3))
    prepared(store, (3, 4))
    assert chain_of(store, alone) == several


def test_a_stage_that_is_gone_is_missed(store: ArtifactStore) -> None:
    first, second, third = prepared(store, (1, 2, 3))
    store.remove(second)
    for key in (first, third):
        with pytest.raises(ConfigError, match=f"all 3 stages .* got none of {second[:12]}"):
            stage_chain(store, key)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_stages_that_name_none_are_joined_by_their_days(
    store: ArtifactStore, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [put(store, f"toy-s{n}", week(n)) for n in (1, 2, 3)]
    put(store, "longer-s1", (14, 28, 29))
    put(store, "other-s1", (14, 21, 22), validation_share=0.1)
    put(store, "gap", (35, 42, 43))
    put(store, "later-s4", week(4), together=[*keys, *keys_of([4])])
    caplog.clear()  # of what was said while the data sets were made
    with caplog.at_level(logging.WARNING, logger="forge_ray"):
        assert chain_of(store, keys[place]) == keys
    said = caplog.text
    assert all(f"toy-s{n}-{key[:12]}" in said for n, key in enumerate(keys, start=1))
    assert "later" not in said


def test_numbers_of_published_stages_may_leave_some_out(store: ArtifactStore) -> None:
    numbers = (20250929, 20250930, 20251001, 20251003)
    keys = [put(store, f"in-s{n}", (n, n + 1, n + 2), kind="published") for n in reversed(numbers)]
    assert chain_of(store, keys[0]) == keys[::-1]
    assert chain_of(store, keys[3]) == keys[::-1]


def test_a_dataset_without_stages_is_refused(store: ArtifactStore) -> None:
    alone = put(store, "toy-s1", (0, 7, 8))
    with pytest.raises(ConfigError, match="got none that was prepared with it"):
        stage_chain(store, alone)
    config = {"split": {"kind": "leave_one_out"}, "stage": None}
    built = store.build("dataset", "loo", config, produce=lambda writer: ArtifactInfo())
    with pytest.raises(ConfigError, match="got a leave_one_out split"):
        stage_chain(store, built.key)
