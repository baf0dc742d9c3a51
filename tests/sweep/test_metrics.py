"""What a metrics server hears of a sweep: from the ledger alone, with few tags."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest
import ray

from forge_ray.sweep.config import BudgetConfig, SweepConfig
from forge_ray.sweep.ledger import Ledger
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.metrics import GAUGES, Reading, exporting, lost_nodes, readings
from forge_ray.sweep.prices import Prices
from tests.sweep.records import METRIC, records, trial

CONFIG = SweepConfig(
    name="shop",
    space={"size": {"choice": [1, 2]}},
    gate=GateConfig(min_uniqueness=0.5),
    budget=BudgetConfig(max_cost=10.0, prices=Prices(cpu_hour=36.0)),
)


def found(*trials) -> dict[tuple[str, ...], float]:
    """Values by name and tags."""
    return by_tags(readings(records(*trials), CONFIG, progressed=5.0))


def by_tags(rows: list[Reading]) -> dict[tuple[str, ...], float]:
    for one in rows:
        assert set(one.tags) == set(GAUGES[one.name].tags)
    values = {(one.name, *one.tags.values()): one.value for one in rows}
    assert len(values) == len(rows)
    return values


def test_trials_are_counted_by_state_and_reason() -> None:
    broken = {"uniqueness": 0.1}
    sound = {"uniqueness": 0.9, "usage_min": 0.9, "backoff_gain": 0.5}
    values = found(
        trial(0, value=0.1),
        trial(1, state="running"),
        trial(2, state="failed"),
        trial(3, state="pruned", pruned_by="asha"),
        trial(4, state="pruned", pruned_by="gate", proxies=broken),
        trial(5, state="pruned", pruned_by="gate", proxies=sound),
        trial(6, state="pruned", pruned_by="gate", proxies={"infeasible": True}),
    )
    trials = {key[1:]: value for key, value in values.items() if key[0] == "forge_trials"}
    assert trials == {
        ("waiting", ""): 0,
        ("running", ""): 1,
        ("complete", ""): 1,
        ("failed", ""): 1,
        ("pruned", "halving"): 1,
        ("pruned", "limits"): 1,
        ("pruned", "gate"): 1,
        ("pruned", "infeasible"): 1,
    }


def test_the_best_trial_and_what_was_spent() -> None:
    values = found(trial(0, value=0.1), trial(1, value=0.3))
    assert values["forge_best_metric", METRIC] == 0.3
    assert values["forge_incumbent_proxy", "backoff_bits"] == 9.0
    assert ("forge_incumbent_proxy", "embedding_hitrate") not in values
    assert values["forge_stage_seconds", "train"] == 60
    # 36 USD an hour: 62 CPU seconds are 0.62 USD, of a budget of 10.
    assert values["forge_cost_usd", "train"] == pytest.approx(0.60)
    assert values["forge_cost_usd", "evaluate"] == 0
    assert values["forge_budget_share", "cost"] == pytest.approx(0.062)
    assert ("forge_budget_share", "hours") not in values
    assert values["forge_progress_timestamp_seconds",] == 5.0


def test_nothing_is_said_of_a_best_trial_before_there_is_one() -> None:
    names = {key[0] for key in found(trial(0, state="running"))}
    assert "forge_best_metric" not in names
    assert "forge_incumbent_proxy" not in names
    assert "forge_trials" in names


def test_nodes_that_were_meant_to_go_are_not_lost() -> None:
    nodes = [
        {"NodeID": str(number), "Alive": reason is None, "DeathReason": reason or 0}
        for number, reason in enumerate((None, 1, 2, 2, 3, 4))
    ]
    values = by_tags(lost_nodes(nodes, before=frozenset({"2"})))
    assert values == {("forge_nodes_lost", "died"): 1, ("forge_nodes_lost", "preempted"): 1}


@pytest.mark.ray
def test_a_running_sweep_is_scraped(ray_local, tmp_path: Path) -> None:
    """Ray passes gauges on every 10 seconds."""
    ledger = Ledger(tmp_path)
    ledger.append("session", remaining=3)
    with exporting(CONFIG, tmp_path):
        port = ray.nodes()[0]["MetricsExportPort"]
        ledger.append("start", key="a", number=0, point={}, config={})
        until = time.monotonic() + 60
        text = ""
        # Other sweeps of this process may have left gauges of theirs for some seconds.
        while 'state="running",' not in text and time.monotonic() < until:
            time.sleep(0.5)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
                lines = page.read().decode().splitlines()
            ours = [one for one in lines if 'sweep="shop"' in one]
            text = "\n".join(one for one in ours if one.startswith("ray_forge_trials{"))
    running = next(one for one in text.splitlines() if 'state="running"' in one)
    assert float(running.rsplit(" ", 1)[1]) in (0.0, 1.0)
