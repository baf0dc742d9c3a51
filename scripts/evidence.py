"""The evidence behind the gate: what proxies were worth in a sweep that pruned nothing.

And what every way of pruning would have found and cost on it. See docs/evidence.md.

Usage: python scripts/record.py evidence_beauty -- python scripts/evidence.py sweeps/evidence.yaml
       … --store DIR --orders 200 key=value …      (values of the sweep file)

Continues or runs the sweep, then prints JSON. Costs are full trainings (optimizer steps).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.launch.connect import connected
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.evidence import (
    designs_of,
    evidence_of,
    is_control,
    is_one_to_one,
    rank_proxies,
    seed_spread,
)
from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.ledger import SweepRecords, TrialRecord
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.replay import Evidence, Policy, replay_orders, standard_policies, summarize
from forge_ray.sweep.resolve import trial_config
from forge_ray.sweep.space import label_point
from forge_ray.sweep.sweep import run_sweep

RISKS = (0.1, 0.2)


def main() -> None:
    """Runs the sweep and prints what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--store", default="./forge-store")
    parser.add_argument("--orders", type=int, default=200)
    options = parser.parse_args()
    config = load_config(SweepConfig, path=options.file, overrides=options.overrides)
    with connected(verbose=False):
        records = run_sweep(config, ArtifactStore(options.store)).records
    max_steps = trial_config(config, {}).gr.max_steps
    content = describe(records, config.metric, max_steps=max_steps, orders=options.orders)
    print(json.dumps(_finite(content), allow_nan=False))


def describe(records: SweepRecords, metric: str, *, max_steps: int, orders: int) -> dict[str, Any]:
    """Designs, proxies, seeds, replays."""
    trials = list(records.trials.values())
    designs = designs_of(trials)
    spread = seed_spread(trials)
    evidence = evidence_of(designs, metric=metric, max_steps=max_steps)
    goal = evidence.best.final - evidence.best.error
    return {
        "metric": metric,
        "floors": {name: row.get(metric) for name, row in records.floors.items()},
        "designs": [row(one, metric) for one in designs],
        "seeds": {**dataclasses.asdict(spread), "deviation": spread.deviation},
        "proxies": [dataclasses.asdict(one) for one in rank_proxies(designs)],
        "near_best": sum(one.final >= goal for one in evidence.designs),
        "orders": orders,
        "policies": replays(evidence, max_steps=max_steps, orders=orders),
    }


def row(record: TrialRecord, metric: str) -> dict[str, Any]:
    """One design with all that the page shows of it."""
    return {
        "design": label_point(record.point),
        "is_control": is_control(record),
        "is_one_to_one": is_one_to_one(record),
        "value": record.value,
        "error": record.final.get(f"{metric}_se"),
        "final": {name: record.final.get(name) for name in ("ItemHit@10", f"{metric}/tail")},
        "curve": {str(one["global_step"]): one[metric] for one in record.history},
        "proxies": {name: value for name, value in record.proxies.items() if _is_number(value)},
        "seconds": record.seconds,
    }


def replays(evidence: Evidence, *, max_steps: int, orders: int) -> list[dict[str, Any]]:
    """Every policy at every risk; random search gets what the calibrated gate spends."""
    rows = []
    for risk in RISKS:
        gate = GateConfig(risk=risk)
        found = run_policies(evidence, policies(gate, max_steps), orders)
        spent = {one["name"]: one["train_cost"] * evidence.full_cost for one in found}
        off = Policy(
            name="",
            gate=dataclasses.replace(gate, mode="off"),
            asha=AshaConfig(enabled=False),
        )
        random = [
            dataclasses.replace(off, name=f"random search, cost of {name}", budget=spent[name])
            for name in ("calibrated", "calibrated, promising first")
        ]
        found += run_policies(evidence, random, orders)
        rows += [{"risk": risk, **one} for one in found]
    return rows


def policies(gate: GateConfig, max_steps: int) -> list[Policy]:
    """The standard ones, halving with an early and with a late first rung."""
    chosen: dict[str, Policy] = {}
    for grace in (max_steps // 6, max_steps // 3):
        for one in standard_policies(gate=gate, asha=AshaConfig(grace_steps=grace)):
            name = one.name.replace("ASHA", f"ASHA from step {grace}")
            chosen[name] = dataclasses.replace(one, name=name)
    return list(chosen.values())


def run_policies(evidence: Evidence, asked: Sequence[Policy], orders: int) -> list[dict[str, Any]]:
    """Summaries as mappings."""
    return [
        dataclasses.asdict(
            summarize(evidence, one.name, replay_orders(evidence, one, num_orders=orders))
        )
        for one in asked
    ]


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
