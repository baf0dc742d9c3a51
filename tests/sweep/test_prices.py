from __future__ import annotations

import pytest

from forge_ray.config import from_mapping, to_mapping
from forge_ray.errors import ConfigError
from forge_ray.sweep.config import BudgetConfig, SweepConfig
from forge_ray.sweep.prices import NodePrice, Prices, stage_costs, trial_cost
from tests.sweep.records import trial

FLAT = Prices(cpu_hour=0.36, gpu_hour=3.6)
SPOT = {"ray.io/accelerator-type": "A100", "ray.io/market-type": "spot"}

ON_DEMAND = {"ray.io/market-type": "on-demand"}


def test_seconds_times_what_was_held_times_the_price() -> None:
    record = trial(
        0,
        attempts=[{"fit": 10.0, "train": 100.0}, {"train": 50.0, "evaluate": 1.0}],
        cpus={"fit": 0.5, "train": 2.0},
        gpus={"train": 1.0},
    )
    costs = stage_costs(record, FLAT)
    assert costs == pytest.approx(
        {"fit": 10 * 0.5 * 1e-4, "train": 150 * (2e-4 + 1e-3), "evaluate": 0.0}
    )
    assert trial_cost(record, FLAT) == pytest.approx(sum(costs.values()))
    assert trial_cost(record, Prices()) == 0.0


def test_each_start_pays_where_it_ran() -> None:
    nodes = {
        "spot": NodePrice(hour=3.6, cpus=8, gpus=2, labels=SPOT),
        "on-demand": NodePrice(
            hour=36.0, cpus=8, gpus=2, labels={"ray.io/market-type": "on-demand"}
        ),
    }
    record = trial(
        0,
        attempts=[{"train": 10.0}, {"train": 10.0}, {"train": 10.0}],
        places=[{"train": SPOT}, {"train": ON_DEMAND}],
        cpus={"train": 2.0},
        gpus={"train": 1.0},
    )
    # One GPU of two is half of a node, although two CPUs of eight are a quarter.
    expected = 10 * (0.5e-3 + 0.5e-2) + 10 * (2e-4 + 1e-3)
    assert trial_cost(record, Prices(cpu_hour=0.36, gpu_hour=3.6, nodes=nodes)) == pytest.approx(
        expected
    )


def test_a_node_without_labels_is_the_default_and_order_decides() -> None:
    nodes = {"spot": NodePrice(hour=1.0, cpus=1, labels=SPOT), "any": NodePrice(hour=2.0, cpus=4)}
    prices = Prices(cpu_hour=99.0, nodes=nodes)
    assert prices.per_second(cpus=1, gpus=0, labels=SPOT) == pytest.approx(1 / 3600)
    assert prices.per_second(cpus=8, gpus=0, labels={}) == pytest.approx(4 / 3600)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_hours": 0}, "budget.max_hours must be > 0"),
        ({"max_cost": -1, "prices": {"cpu_hour": 1}}, "budget.max_cost must be > 0"),
        ({"max_cost": 5}, "budget.prices must be set"),
        ({"prices": {"gpu_hour": -1}}, "budget.prices must be >= 0"),
        ({"prices": {"nodes": {"big": {"hour": 3}}}}, "cpus > 0"),
        ({"prices": {"nodes": {"big": {"hours": 3, "cpus": 1}}}}, "hours"),
    ],
)
def test_mistakes_fail_at_load(budget, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(SweepConfig, {"name": "x", "space": {"a": {"value": 1}}, "budget": budget})


def test_prices_survive_as_yaml() -> None:
    prices = Prices(cluster_hour=0.2, nodes={"spot": NodePrice(hour=1.0, cpus=1, labels=SPOT)})
    config = SweepConfig(
        name="x", space={"a": {"value": 1}}, budget=BudgetConfig(max_cost=3.0, prices=prices)
    )
    assert from_mapping(SweepConfig, to_mapping(config)) == config
