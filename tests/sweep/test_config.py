from __future__ import annotations

import dataclasses

import pytest

from forge_ray.config import from_mapping, load_config, to_mapping
from forge_ray.errors import ConfigError
from forge_ray.sweep.config import (
    EvaluationConfig,
    SweepConfig,
    difference,
    identity,
    without_running,
)

SPACE = {"sid.quantizer.kind": {"choice": ["rq_kmeans", "rq_vae"]}}


def test_files_load_with_dotted_names_and_overrides(tmp_path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "name: demo\nspace:\n  sid.levels: {int: [2, 4]}\n"
        "points:\n- {sid.quantizer.kind: random}\ngate: {warmup: 2}\n"
    )
    config = load_config(SweepConfig, path=path, overrides=["data=/x", "gr.lr=1e-3"])
    assert config.space == {"sid.levels": {"int": [2, 4]}}
    assert config.points == [{"sid.quantizer.kind": "random"}]
    assert config.gate.warmup == 2
    assert config.gr == {"lr": 1e-3}
    assert from_mapping(SweepConfig, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "name must"),
        ({"name": "a/b"}, "name must"),
        ({"num_trials": 0}, "num_trials"),
        ({"num_trials": None}, "sampler"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"resources": {"autoscaled": {"gpu": {"max_nodes": 0}}}}, "max_nodes >= 1"),
        ({"space": {}}, "space must"),
        ({"sampler": {"kind": "magic"}}, "sampler.kind must be one of"),
    ],
)
def test_mistakes_fail_at_load(change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(SweepConfig, {"name": "x", "space": SPACE, **change})


def test_identity_leaves_space_and_budget_free() -> None:
    config = SweepConfig(name="x", space=SPACE)
    grown = SweepConfig(name="x", space={**SPACE, "a": {"value": 1}}, num_trials=20)
    assert identity(config, dataset_key="d") == identity(grown, dataset_key="d")
    other = SweepConfig(name="x", space=SPACE, gr={"lr": 0.1})
    changed = difference(identity(config, dataset_key="d"), identity(other, dataset_key="e"))
    assert changed == ['dataset: "d" -> "e"', "gr.lr: unset -> 0.1"]


def test_identity_leaves_out_where_stages_run() -> None:
    base = SweepConfig(name="x", space=SPACE, gr={"max_steps": 5})
    moved = dataclasses.replace(
        base,
        sid={"encode": {"max_actors": 3}},
        gr={
            "max_steps": 5,
            "num_workers": 2,
            "worker_labels": {"ray.io/market-type": "spot"},
            "worker_resources": {"memory": 1.0},
            "data": {"prefetch_batches": 8, "read_cpus": 0.25},
        },
        evaluation=EvaluationConfig(batch_users=7),
    )
    first, second = (identity(one, dataset_key="d") for one in (base, moved))
    assert difference(first, second) == []
    window = dataclasses.replace(base, gr={"max_steps": 5, "data": {"window_batches": 8}})
    changed = difference(first, identity(window, dataset_key="d"))
    assert changed == ["gr.data.window_batches: unset -> 8"]


def test_an_identity_with_settings_that_left_it_still_matches() -> None:
    now = identity(SweepConfig(name="x", space=SPACE), dataset_key="d")
    earlier = {**now, "evaluation": {**now["evaluation"], "batch_users": 64}}
    assert difference(without_running(earlier), now) == []
