from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.errors import ConfigError
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.objectives import cutoff, direction, objective_values, pareto_front
from forge_ray.sweep.prices import Prices
from tests.sweep.records import METRIC, trial

AIMS = [METRIC, f"{METRIC}/tail", "sid_bits", "cpu_seconds"]


def made(number: int, *, value: float, bits: float, **fields):
    final = {METRIC: value, f"{METRIC}/tail": 0.1}
    facts = {"sid_bits": bits, "tokens_per_item": 3}
    return trial(number, value=value, facts=facts, **{"final": final, **fields})


def test_metrics_grow_and_costs_shrink() -> None:
    assert [direction(name) for name in AIMS] == [1, 1, -1, -1]
    assert [cutoff(name) for name in (*AIMS, "coverage@20")] == [10, 10, None, None, 20]
    for name in ("ItemNDCG", "ItemNDCG@0", "ItemNDCG@10/middle", "bits", "coverage@10/tail"):
        with pytest.raises(ConfigError, match="objectives must name"):
            direction(name)


def test_values_come_from_the_record_of_a_complete_trial() -> None:
    record = made(0, value=0.3, bits=24.0, attempts=[{"fit": 2.0, "train": 1.0}, {"train": 30.0}])
    assert objective_values(record, AIMS, Prices()) == {
        METRIC: 0.3,
        f"{METRIC}/tail": 0.1,
        "sid_bits": 24.0,
        "cpu_seconds": 2.0 * 0.5 + 31.0,
    }
    assert objective_values(made(1, value=0.3, bits=1.0, state="pruned"), AIMS, Prices()) is None
    assert (
        objective_values(made(1, value=0.3, bits=1.0, final={METRIC: 0.3}), AIMS, Prices()) is None
    )
    assert objective_values(made(1, value=0.3, bits=float("nan")), AIMS, Prices()) is None


def test_a_trial_costs_what_the_prices_say() -> None:
    record = made(0, value=0.3, bits=24.0, attempts=[{"train": 1800.0}])
    prices = Prices(cpu_hour=2.0)
    assert objective_values(record, ["cost_usd"], prices) == {"cost_usd": 1.0}
    with pytest.raises(ConfigError, match=r"budget\.prices must be set for the objective cost_usd"):
        SweepConfig(name="s", space={"a": {"value": 1}}, objectives=["ItemNDCG@10", "cost_usd"])


def test_the_front_holds_what_nothing_dominates() -> None:
    records = [
        made(0, value=0.1, bits=24.0),  # beaten by 2 in both
        made(1, value=0.3, bits=24.0),
        made(2, value=0.2, bits=16.0),
        made(3, value=0.2, bits=16.0),  # a tie stays
        made(4, value=0.2, bits=20.0),  # beaten by 2 in bits alone
        made(5, value=0.9, bits=1.0, state="pruned"),
    ]
    front = pareto_front(records, [METRIC, "sid_bits"], Prices())
    assert [one.number for one in front] == [1, 2, 3]
    assert [one.number for one in pareto_front(records, [METRIC], Prices())] == [1]
    assert pareto_front([], [METRIC], Prices()) == []


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_every_trial_is_on_the_front_or_dominated_by_it(pairs) -> None:
    records = [made(i, value=float(v), bits=float(b)) for i, (v, b) in enumerate(pairs)]
    front = pareto_front(records, [METRIC, "sid_bits"], Prices())
    assert front
    for record in records:
        value, bits = record.final[METRIC], record.facts["sid_bits"]
        assert any(one.final[METRIC] >= value and one.facts["sid_bits"] <= bits for one in front)


def test_the_first_objective_is_the_metric() -> None:
    SweepConfig(name="s", points=[{}], objectives=AIMS)
    for wrong in (["sid_bits", METRIC], [METRIC, METRIC], ["sid_bits"]):
        with pytest.raises(ConfigError, match="begin with metric"):
            SweepConfig(name="s", points=[{}], objectives=wrong)
    with pytest.raises(ConfigError, match="got 'speed'"):
        SweepConfig(name="s", points=[{}], objectives=[METRIC, "speed"])
