from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest

from forge_ray.errors import ConfigError
from forge_ray.sweep.capacity import Bundle, Demand, Nodes, at_once, check_fits, copies, selects

CPU_NODE = Nodes(resources={"CPU": 8, "memory": 8 * 1024**3})
GPU_NODES = Nodes(resources={"CPU": 4, "GPU": 1}, labels={"market": "spot"}, num=3, is_up=False)


def training(*, workers: int = 1, gpus: float = 1.0, cpus: float = 1.0) -> Demand:
    worker = Bundle(resources={"CPU": cpus, "GPU": gpus}, num=workers)
    return Demand(stage="train", held=(worker,))


def test_gpus_bound_the_trials_at_a_time() -> None:
    nodes = [CPU_NODE, GPU_NODES]
    assert copies(training(), nodes, limit=100) == 3
    assert copies(training(workers=2), nodes, limit=100) == 1
    assert copies(training(workers=2), nodes, limit=0) == 0


def test_what_nodes_hold_together_does_not_count() -> None:
    # Two nodes of 4 CPUs hold no worker of 6.
    assert not copies(training(cpus=6, gpus=0), [Nodes(resources={"CPU": 4}, num=2)], limit=1)


def test_plain_work_leaves_gpu_nodes_to_those_that_need_them() -> None:
    reading = Bundle(resources={"CPU": 4})
    demand = Demand(stage="train", held=(reading, *training(cpus=4).held))
    assert copies(demand, [GPU_NODES, CPU_NODE], limit=9) == 2


def test_tasks_that_stages_wait_for_keep_their_cpu() -> None:
    encode = Bundle(resources={"CPU": 1})
    fit = Demand(stage="fit", held=(Bundle(resources={"CPU": 0.5}),), shared=(encode,))
    two = [Nodes(resources={"CPU": 2})]
    assert at_once([training(gpus=0)], two, limit=9) == 2
    assert at_once([fit, training(gpus=0)], two, limit=9) == 1
    # On one CPU a single trial still goes stage by stage.
    one = [Nodes(resources={"CPU": 1.5})]
    check_fits([fit, training(gpus=0)], one)
    assert at_once([fit, training(gpus=0)], one, limit=9) == 1


def test_the_order_of_nodes_and_bundles_does_not_matter() -> None:
    four, one = Bundle(resources={"CPU": 4}), Bundle(resources={"CPU": 1})
    sizes = [Nodes(resources={"CPU": cpus}) for cpus in (4, 1)]
    for nodes in (sizes, sizes[::-1]):
        assert copies(Demand(stage="fit", held=(four,), shared=(one,)), nodes, limit=9) == 1
        assert copies(Demand(stage="fit", held=(one, four)), nodes, limit=9) == 1


@pytest.mark.parametrize("seed", range(200))
def test_a_stage_fits_where_any_packing_holds_it(seed: int) -> None:
    draw = random.Random(seed)
    nodes = [
        Nodes(resources={"CPU": draw.randint(0, 6), "GPU": draw.choice([0, 0, 1])})
        for _ in range(draw.randint(1, 3))
    ]
    held, shared = (
        tuple(
            Bundle(
                resources={"CPU": draw.randint(1, 4), "GPU": draw.choice([0, 0, 1])},
                num=draw.randint(1, 2),
            )
            for _ in range(draw.randint(least, 2))
        )
        for least in (1, 0)
    )
    demand = Demand(stage="fit", held=held, shared=shared)
    found = copies(demand, nodes, limit=1)
    assert bool(found) is any_packing_holds([*held, *shared], nodes)
    # More copies are never promised than fit.
    count = copies(demand, nodes, limit=3)
    more = [dataclasses.replace(one, num=one.num * count) for one in held]
    assert count >= found
    assert count == 0 or any_packing_holds([*more, *shared], nodes)
    draw.shuffle(nodes)
    assert copies(demand, nodes, limit=3) == count


def any_packing_holds(bundles: Sequence[Bundle], nodes: Sequence[Nodes]) -> bool:
    """Tries every one."""
    items = [one.resources for one in bundles for _ in range(one.num)]

    def place(at: int, free: list[dict[str, float]]) -> bool:
        if at == len(items):
            return True
        for node in free:
            if all(node[name] >= amount for name, amount in items[at].items()):
                rest = {name: node[name] - amount for name, amount in items[at].items()}
                if place(at + 1, [rest if one is node else one for one in free]):
                    return True
        return False

    return place(0, [dict(one.resources) for one in nodes])


def test_a_large_cluster_is_packed_in_seconds() -> None:
    spot = Nodes(resources={"CPU": 8, "GPU": 8}, labels={"market": "spot"}, num=300)
    demand = training(workers=4)
    assert copies(demand, [CPU_NODE, spot], limit=10_000) == 600


def test_fractions_add_up() -> None:
    tenth = Demand(stage="fit", held=(Bundle(resources={"CPU": 0.1}),))
    assert copies(tenth, [Nodes(resources={"CPU": 1})], limit=99) == 10


def test_a_trial_that_never_fits_is_refused_with_numbers() -> None:
    check_fits([training(workers=3)], [CPU_NODE, GPU_NODES])
    with pytest.raises(ConfigError) as error:
        check_fits([training(workers=4)], [CPU_NODE, GPU_NODES])
    assert str(error.value) == (
        "resources must fit one trial on the cluster, got train: 4 x {CPU: 1, GPU: 1} where there "
        "is 1 x {CPU: 8, memory: 8.0 GiB}; 3 x {CPU: 4, GPU: 1} with market: spot (autoscaler). "
        "Lower what gr and resources ask for, or add nodes; those that an autoscaler adds count "
        "where resources.autoscaled names them."
    )


@pytest.mark.parametrize(
    ("selector", "is_chosen"),
    [
        ({}, True),
        ({"market": "spot"}, True),
        ({"market": "!spot"}, False),
        ({"market": "in(on-demand, spot)"}, True),
        ({"market": "!in(on-demand, spot)"}, False),
        ({"zone": "a"}, False),
        ({"zone": "!a"}, True),
        ({"zone": "!in(a,b)", "market": "spot"}, True),
        ({"market": "inside"}, False),
    ],
)
def test_selectors_read_as_ray_reads_them(selector: dict[str, str], is_chosen: bool) -> None:
    assert selects(selector, {"market": "spot"}) is is_chosen


def test_labels_decide_where_a_stage_may_run() -> None:
    held = (Bundle(resources={"CPU": 1}, labels={"market": "!spot"}),)
    demand = Demand(stage="fit", held=held)
    assert copies(demand, [GPU_NODES], limit=1) == 0
    assert copies(demand, [GPU_NODES, CPU_NODE], limit=99) == 8
    with pytest.raises(ConfigError, match="on nodes with market: !spot"):
        check_fits([demand], [GPU_NODES])
