from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from forge_ray.errors import ConfigError
from forge_ray.sweep import budget as module
from forge_ray.sweep.budget import BudgetWatch, budget_state, check_affordable, refusal
from forge_ray.sweep.config import BudgetConfig
from forge_ray.sweep.estimate import Estimator, StageEstimate, TrialEstimate
from forge_ray.sweep.ledger import Ledger, ScoredDesign
from forge_ray.sweep.prices import NodePrice, Prices
from forge_ray.sweep.searcher import TrialSpec
from tests.sweep.records import records, trial
from tests.sweep.stubs import StubStages

# A CPU second costs a dollar.
PRICES = Prices(cpu_hour=3600.0)
SPANS = [
    ("2030-01-01T00:00:00+00:00", "2030-01-01T01:00:00+00:00"),
    ("2030-01-02T00:00:00+00:00", "2030-01-02T00:30:00+00:00"),
]


def ahead(seconds: float, usd: float) -> TrialEstimate:
    return TrialEstimate(stages=(StageEstimate(stage="train", seconds=seconds, cost_usd=usd),))


def test_spending_follows_from_the_ledger() -> None:
    scored = ScoredDesign(key="x", proxies={}, seconds={"fit": 6.0}, cpus={"fit": 1.0}, gpus={})
    found = records(
        trial(0, attempts=[{"fit": 2.0}, {"train": 5.0}], cpus={"fit": 0.5, "train": 2.0}),
        trial(1, state="failed", attempts=[{"fit": 2.0}], cpus={"fit": 1.0}),
    )
    found = dataclasses.replace(found, spans=SPANS, scored={"x": scored})
    config = BudgetConfig(max_cost=100.0, max_hours=2.0, prices=PRICES)
    state = budget_state(found, config)
    # Of designs that were scored and have not started as well.
    assert state.usd_by_stage == {"fit": 1.0 + 2.0 + 6.0, "train": 10.0}
    assert (state.spent_usd, state.left_usd) == (19.0, 81.0)
    assert (state.spent_hours, state.left_s) == (1.5, 1800.0)
    assert state.spent_reason == ""
    rented = BudgetConfig(max_cost=3.0, prices=Prices(cluster_hour=2.0))
    assert budget_state(found, rented).usd_by_stage["cluster"] == 3.0
    assert budget_state(found, rented).spent_reason == "budget.max_cost: 3 of 3 USD are spent"
    assert budget_state(found, BudgetConfig(max_hours=1.5)).spent_reason


def test_a_trial_starts_only_where_it_fits() -> None:
    found = dataclasses.replace(
        records(trial(0, attempts=[{"train": 6.0}], cpus={"train": 1.0})), spans=SPANS[:1]
    )
    state = budget_state(found, BudgetConfig(max_cost=10.0, max_hours=2.0, prices=PRICES))
    assert refusal(state, ahead(60.0, 4.0)) == ""
    assert "expected to cost 4.1" in refusal(state, ahead(60.0, 4.1))
    assert "expected to cost 3" in refusal(state, ahead(60.0, 3.0), committed_usd=2.0)
    assert "expected to take 1.01" in refusal(state, ahead(3636.0, 0.0))
    assert refusal(state, TrialEstimate()) == ""


def test_a_budget_below_one_trial_is_refused() -> None:
    config = BudgetConfig(max_cost=2.0, max_hours=1.0, prices=PRICES)
    check_affordable([ahead(60.0, 3.0), ahead(60.0, 1.5)], config)
    check_affordable([], config)
    with pytest.raises(ConfigError, match=r"max_cost must pay .* got 2 USD for an estimated 2\.5"):
        check_affordable([ahead(60.0, 3.0), ahead(60.0, 2.5)], config)
    with pytest.raises(ConfigError, match="max_hours must be enough"):
        check_affordable([ahead(7200.0, 0.0)], config)


def test_the_cluster_s_hours_count_for_what_comes_next() -> None:
    prices = Prices(cluster_hour=10.0)
    found = dataclasses.replace(
        records(trial(0, attempts=[])), spans=[("2030-01-01T00:00", "2030-01-01T00:03")]
    )
    config = BudgetConfig(max_cost=1.0, prices=prices)
    state = budget_state(found, config)
    assert state.left_usd == 0.5
    assert refusal(state, ahead(180.0, 0.0)) == ""
    assert "expected to cost 10" in refusal(state, ahead(3600.0, 0.0))
    check_affordable([ahead(3600.0, 0.0), ahead(300.0, 0.1)], config)
    with pytest.raises(ConfigError, match=r"got 1 USD for an estimated 1\.1"):
        check_affordable([ahead(360.0, 0.1)], config)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: at[0])
    return at


def watch_of(
    folder: Path, *, prices: Prices = PRICES, **limits: float
) -> tuple[BudgetWatch, Ledger]:
    ledger = Ledger(folder)
    config = BudgetConfig(prices=prices, **limits)
    estimator = Estimator(stages=StubStages(str(folder)), prices=prices, meaning={}, max_steps=30)
    ledger.append("session")
    return BudgetWatch(ledger=ledger, config=config, estimator=estimator), ledger


def start(watch: BudgetWatch, ledger: Ledger, key: str) -> None:
    ledger.append("start", key=key, number=0, point={}, config={}, cpus={"fit": 1.0, "train": 2.0})
    watch.touch(key)


def test_running_trials_count_and_are_ended_at_the_limit(tmp_path: Path, clock) -> None:
    watch, ledger = watch_of(tmp_path, max_cost=50.0)
    start(watch, ledger, "a")
    clock[0] += 40
    assert watch.state().spent_usd == 40.0
    assert not watch.stop_all()
    ledger.append("row", key="a", stage="proxy", metrics={"x": 1}, seconds={"fit": 10.0})
    watch.touch("a")
    assert watch.state().spent_usd == 10.0  # the row says it better
    clock[0] += 20
    assert watch.stop_all()
    assert watch.reason == "budget.max_cost: 50 of 50 USD are spent"
    # Kept by the ledger: the next driver knows as well.
    kept = budget_state(Ledger(tmp_path).read(), BudgetConfig(prices=PRICES))
    assert kept.usd_by_stage == {"fit": 10.0, "train": 40.0}


def test_a_beat_a_minute_reaches_the_ledger(tmp_path: Path, clock) -> None:
    watch, ledger = watch_of(tmp_path)
    start(watch, ledger, "a")
    for _ in range(5):
        clock[0] += 30
        assert not watch.stop_all()
    assert Ledger(tmp_path).read().trials["a"].seconds == {"fit": 120.0}


def test_snapshots_of_tune_do_not_carry_the_ledger(tmp_path: Path, clock) -> None:
    watch, ledger = watch_of(tmp_path)
    sizes = [len(pickle.dumps(watch))]
    for number in range(20):
        start(watch, ledger, f"k{number}")
    assert [len(pickle.dumps(watch))] == sizes


def test_admitted_trials_are_paid_for_before_they_start(tmp_path: Path, clock) -> None:
    watch, ledger = watch_of(tmp_path, max_cost=30.0)
    start(watch, ledger, "a")
    ledger.append("row", key="a", stage="proxy", metrics={"x": 1}, seconds={"fit": 10.0})
    ledger.append("finish", key="a", state="pruned")
    watch.drop("a")
    specs = [TrialSpec(number=n, key=f"k{n}", point={}, config={}) for n in range(3)]
    assert [watch.admits(spec) for spec in specs] == [True, True, False]
    assert "expected to cost 10" in watch.reason
    assert watch.admits(TrialSpec(number=9, key="i", point={}, config={}, infeasible="too small"))


def test_before_its_first_row_a_stage_counts_where_one_ran_last(tmp_path: Path, clock) -> None:
    zones = {name: {"zone": name} for name in ("cheap", "dear")}
    nodes = {
        name: NodePrice(hour=3600.0 * usd, cpus=1.0, labels=zones[name])
        for name, usd in (("cheap", 1.0), ("dear", 5.0))
    }
    watch, ledger = watch_of(tmp_path, prices=Prices(nodes=nodes))
    start(watch, ledger, "a")
    clock[0] += 10
    assert watch.state().spent_usd == 50.0  # nothing is known: the dearest
    watch.beat()
    assert watch.state().spent_usd == 50.0
    row = {"stage": "proxy", "metrics": {"x": 1}, "seconds": {"fit": 10.0}}
    ledger.append("row", key="a", places={"fit": zones["cheap"]}, **row)
    ledger.append("finish", key="a", state="pruned")
    watch.drop("a")
    assert watch.state().spent_usd == 10.0  # its row says it better
    start(watch, ledger, "b")
    clock[0] += 10
    assert watch.state().spent_usd == 20.0
    watch.beat()
    kept = budget_state(Ledger(tmp_path).read(), BudgetConfig(prices=Prices(nodes=nodes)))
    assert kept.spent_usd == 20.0


def test_one_design_that_does_not_fit_stops_no_sweep(tmp_path: Path, clock) -> None:
    watch, _ = watch_of(tmp_path, prices=Prices(), max_hours=1.0)
    assert watch.may_start([ahead(7200.0, 0.0), ahead(60.0, 0.0)])
    assert watch.may_start([])
    assert not watch.may_start([ahead(7200.0, 0.0), ahead(3700.0, 0.0)])
    assert "expected to take 2" in watch.reason
