from __future__ import annotations

from typing import Any

import pytest
import ray

from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.config import ScoreConfig
from forge_ray.sweep.capacity import Bundle, Demand
from forge_ray.sweep.config import AutoscaledNodes, ResourceConfig
from forge_ray.sweep.demands import (
    Demands,
    cluster_nodes,
    measure_room,
    placing_fields,
    trial_demands,
)

LABELS = {"ray.io/market-type": "!spot"}


def demands(
    gr: dict[str, Any] | None = None, sid: dict[str, Any] | None = None, num_items: int = 100
) -> Demands:
    asked = ResourceConfig(driver_labels=LABELS, stage_labels=LABELS, evaluate_gpus=1.0)
    config = {"gr": gr or {}, "sid": sid or {}}
    return trial_demands(config, asked, ScoreConfig(), num_items=num_items)


def told(bundles: tuple[Bundle, ...]) -> list[tuple[int, dict[str, float]]]:
    return [(one.num, {name: x for name, x in one.resources.items() if x}) for one in bundles]


def test_every_process_of_a_stage_is_counted() -> None:
    fit, train, evaluate = demands(
        {
            "num_workers": 2,
            "cpus_per_worker": 3,
            "use_gpu": True,
            "worker_resources": {"memory": 7.0},
            "worker_labels": {"ray.io/market-type": "spot"},
            "data": {"read_cpus": 0.25, "read_tasks": 3},
        }
    )
    driver = (1, {"memory": 512 * 1024**2})
    assert told(fit.held) == [driver, (1, {"CPU": 0.5})]
    assert fit.shared == ()
    worker = (2, {"CPU": 3, "GPU": 1, "memory": 7})
    assert told(train.held) == [driver, worker, (6, {"CPU": 0.25})]
    assert train.held[1].labels == {"ray.io/market-type": "spot"}
    assert told(evaluate.held) == [driver, (1, {"CPU": 0.5, "GPU": 1})]
    for bundle in (fit.held[0], fit.held[1], evaluate.held[1]):
        assert bundle.labels == LABELS


def test_a_large_catalogue_needs_a_place_for_what_the_tokenizer_starts() -> None:
    (fit, *_) = demands(sid={"encode": {"cpus_per_actor": 0.5}}, num_items=60_000)
    assert told(fit.shared) == [(1, {"CPU": 0.5})]
    (fit, *_) = demands(num_items=300_000)
    assert told(fit.shared) == [(1, {"CPU": 1})]
    (fit, *_) = demands(sid={"train": {"workers": 2, "cpus_per_worker": 2, "read_cpus": 0.5}})
    assert told(fit.held)[2:] == [(2, {"CPU": 2}), (2, {"CPU": 0.5})]


def test_trials_that_differ_in_other_fields_are_of_one_kind() -> None:
    base = {
        "gr": {"num_workers": 1, "data": {"read_cpus": 0.0}, "model": {"kind": "t5"}},
        "sid": {},
    }
    other = {**base, "gr": {**base["gr"], "model": {"kind": "decoder"}}}
    moved = {**base, "gr": {**base["gr"], "worker_labels": {"a": "b"}}}
    assert placing_fields(base) == placing_fields(other)
    assert placing_fields(base) != placing_fields(moved)
    assert placing_fields({**base, "sid": {"train": {"workers": 2}}}) != placing_fields(base)


@pytest.mark.ray
def test_room_on_a_real_cluster(ray_local) -> None:
    kind = demands({"cpus_per_worker": 1.0})
    asked = ResourceConfig(stage_labels=LABELS)
    kind = trial_demands({"gr": {}, "sid": {}}, asked, ScoreConfig(), num_items=100)
    room = measure_room([kind, kind], {}, max_concurrent=3, limit=10)
    assert (room.trials, room.scoring) == (2, 3)
    assert measure_room([kind], {}, max_concurrent=3, limit=1).trials == 1
    more = {"big": AutoscaledNodes(max_nodes=2, cpus=2, memory_gb=1)}
    assert measure_room([kind], more, max_concurrent=None, limit=10).trials > 2
    assert measure_room([], {}, max_concurrent=3, limit=10).trials == 3


@pytest.mark.ray
def test_what_cannot_be_placed_is_refused(ray_local) -> None:
    kind = demands({"cpus_per_worker": 3.0})
    with pytest.raises(ConfigError, match=r"got train: .*1 x \{CPU: 3\}"):
        measure_room([kind], {}, max_concurrent=1, limit=1)
    gpu = {"gpu": AutoscaledNodes(cpus=4, gpus=1)}
    assert measure_room([kind], gpu, max_concurrent=None, limit=5).trials == 1
    held = (Bundle(resources={"CPU": 1}, labels={"market": "in(spot"}),)
    with pytest.raises(ConfigError, match="must be selectors of node labels"):
        measure_room([(Demand(stage="fit", held=held),)], {}, max_concurrent=1, limit=1)


@pytest.mark.ray
def test_nodes_that_run_count_towards_their_type(ray_local) -> None:
    (node,) = cluster_nodes({})
    assert node.resources["CPU"] == 2
    assert not [name for name in node.resources if name.startswith("node:")]
    added = cluster_nodes({"gpu": AutoscaledNodes(max_nodes=3, gpus=1, labels={"a": "b"})})[1]
    assert (added.num, added.is_up, added.resources) == (3, False, {"GPU": 1.0})
    assert added.labels == {"ray.io/node-group": "gpu", "a": "b"}


@pytest.mark.ray
def test_what_others_hold_is_not_free(ray_local) -> None:
    group = ray.util.placement_group([{"CPU": 1}])
    ray.get(group.ready())
    try:
        (node,) = cluster_nodes({}, is_free=True)
        assert node.resources["CPU"] <= 1
        (node,) = cluster_nodes({})
        assert node.resources["CPU"] == 2
    finally:
        ray.util.remove_placement_group(group)
