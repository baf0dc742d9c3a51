"""Which waiting design trains next: scored before anything trains, the most promising goes first.

Order prunes nothing and so needs no guarantee: every other pick is the waiting design whose proxies
promise most, the picks between follow the plan. The former find the best design early; the latter
are a sample that no proxy has chosen, which is what the calibrated gate learns from and is audited
on. Designs without scores (infeasible, or scoring failed) wait for the plan to reach them.

A design picked for its promise is no control of the gate. Taking such designs out of the pool
leaves controls with poorer proxies for their quality than a plain random order would: the gate's
p-values become larger, its test more cautious.

Pure; knows no Tune, no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from forge_ray.sid.metrics.registry import METRICS, rankable
from forge_ray.sweep.calibration import controls_needed, is_evidence, promise
from forge_ray.sweep.gate import GateState, trained_trials
from forge_ray.sweep.limits import GateConfig, is_finite

ORDERS = ("promising", "planned")

By = Literal["promise", "plan"]


@dataclass(frozen=True, kw_only=True)
class Pick:
    """The next design.

    Attributes:
        place: Its place among those waiting.
        by: Why it is next.
    """

    place: int
    by: By


def pick(
    waiting: Sequence[Mapping[str, Any]],
    *,
    turn: int,
    state: GateState,
    config: GateConfig,
    stopped: Mapping[str, float],
) -> Pick:
    """The next of the waiting designs.

    Args:
        waiting: Proxies of each, in order of the plan; empty where a design has none.
        turn: Picks before this one; even turns go to promise.
        state: What the gate knows of trained designs.
        config: Names the proxy that is followed until trained designs say more.
        stopped: What trials that halving stopped could have reached at most, by key.
    """
    by_plan = Pick(place=0, by="plan")
    scored = [
        place for place, proxies in enumerate(waiting) if is_finite(proxies.get(config.proxy))
    ]
    if turn % 2 or not scored:
        return by_plan
    rows = [waiting[place] for place in scored]
    trained, names = trained_trials(state, rows, config, stopped=stopped)
    if names and is_evidence(trained, risk=config.risk):
        proxies = [[METRICS[name].sign * float(row[name]) for name in names] for row in rows]
        scores = promise(trained, np.array(proxies, dtype=np.float64))
    elif len(trained.values) < controls_needed(config.risk):
        sign = rankable(config.proxy, field="gate.proxy").sign
        scores = np.array([sign * float(row[config.proxy]) for row in rows])
    else:
        # As many trained designs as the gate asks for, and proxies do not rank them.
        return by_plan
    return Pick(place=scored[int(np.argmax(scores))], by="promise")
