"""One decision of the calibrated gate, state written, with 1,000 finished trials behind it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from forge_ray.sid.metrics.registry import METRICS
from forge_ray.sweep.gate import GateDecision
from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.scheduler import GateScheduler

METRIC = "ItemNDCG@10"
NUM_ASKED = 50
RUNGS = (100, 200, 400)


def run(scale: float) -> dict[str, Any]:
    """Milliseconds of `GateScheduler.judge` on a proxy row; `scale` of 1,000 trials are finished.

    `cpu_ms` is the mean CPU time: what remains on a busy machine.
    """
    num = int(1000 * scale)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scheduler.json"
        scheduler = GateScheduler(
            # Everybody passes in the end, after the whole test: all are controls.
            gate=GateConfig(random_share=1.0),
            asha=AshaConfig(grace_steps=RUNGS[0]),
            metric=METRIC,
            max_steps=800,
            path=path,
        )
        rng = np.random.default_rng(0)
        fill(scheduler, rng, num)
        times, cpu, pruned = [], time.process_time(), 0
        for index in range(NUM_ASKED):
            row = proxy_row(rng, rng.normal())
            began = time.perf_counter()
            decision = scheduler.judge(f"asked-{index}", row)
            times.append(1000 * (time.perf_counter() - began))
            pruned += decision.would_prune
        cpu = time.process_time() - cpu
        return {
            "finished_trials": num,
            "proxies": len([one for one in METRICS.values() if one.gate_safe]),
            "decisions": NUM_ASKED,
            "would_prune": pruned,
            "state_kb": round(path.stat().st_size / 1000),
            "cpu_ms": round(1000 * cpu / NUM_ASKED, 2),
            "median_ms": round(statistics.median(times), 2),
            "p95_ms": round(float(np.quantile(times, 0.95)), 2),
            "max_ms": round(max(times), 2),
        }


def fill(scheduler: GateScheduler, rng: np.random.Generator, num: int) -> None:
    """Trials that were trained to the end, with their values at every rung."""
    gate, halving = scheduler._gate_state, scheduler._asha_state
    for index in range(num):
        key, quality = f"{index:064x}", rng.normal()
        passed = GateDecision(go=True, rule="warm-up", reason="warm-up", is_control=True)
        gate.decisions[key] = vars(passed).copy()
        row = proxy_row(rng, quality)
        gate.seen[key] = {one.removeprefix("proxy/"): row[one] for one in row if "proxy/" in one}
        gate.finals[key] = [quality, 0.1]
        for step in RUNGS:
            halving.rungs.setdefault(str(step), {})[key] = quality


def proxy_row(rng: np.random.Generator, quality: float) -> dict[str, Any]:
    """Proxies that all say something; the limits are met."""
    names = [one.name for one in METRICS.values() if one.gate_safe]
    row = {f"proxy/{name}": METRICS[name].sign * (quality + rng.normal()) for name in names}
    limits = {"proxy/uniqueness": 1.0, "proxy/usage_min": 1.0, "proxy/backoff_gain": 1.0}
    return {"stage": "proxy", "global_step": 0, **row, **limits}
