"""Stages of one temporal split are found from any one of them, and only those."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.artifacts import ArtifactInfo, ArtifactStore
from forge_ray.data.chain import stage_chain
from forge_ray.errors import ConfigError


def put(store: ArtifactStore, name: str, days: tuple[int, int, int], **options: Any) -> str:
    """A dataset manifest without content."""
    stage = dict(zip(("first", "end", "held_out_end"), days, strict=True))
    split = {"kind": "temporal", "validation_share": 0.5, **options}
    config = {"split": split, "stage": stage}
    built = store.build(
        "dataset", name, config, parents=["log"], produce=lambda writer: ArtifactInfo()
    )
    return built.key


@pytest.mark.parametrize("place", [0, 1, 2])
def test_any_stage_leads_to_all_of_them(store: ArtifactStore, place: int) -> None:
    keys = [put(store, f"toy-s{n}", (n * 7, n * 7 + 7, n * 7 + 8)) for n in (1, 2, 3)]
    put(store, "longer-s1", (14, 28, 29))
    put(store, "other-s1", (14, 21, 22), validation_share=0.1)
    put(store, "gap", (35, 42, 43))
    assert [one.key for one in stage_chain(store, keys[place])] == keys


def test_a_dataset_without_stages_is_refused(store: ArtifactStore) -> None:
    alone = put(store, "toy-s1", (0, 7, 8))
    with pytest.raises(ConfigError, match="got none before or after it"):
        stage_chain(store, alone)
    config = {"split": {"kind": "leave_one_out"}, "stage": None}
    built = store.build("dataset", "loo", config, produce=lambda writer: ArtifactInfo())
    with pytest.raises(ConfigError, match="got a leave_one_out split"):
        stage_chain(store, built.key)
