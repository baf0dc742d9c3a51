"""What a way of pruning would have found and cost, replayed on designs whose outcome is known.

The evidence is an ungated set of trials: every design was scored and trained to the end. A replay
walks through the designs one at a time, in a random order or the promising ones first, asking the
shipped rules (`gate.decide`, `halving.stop_reason`, `order.pick`) what they would have done; a
design that they stop costs what it had cost until then. Unlike a real sweep it has no parallel
trials: a decision knows all that came before.

Pure numpy; runs nothing and reads nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import beta

from forge_ray.errors import DataError
from forge_ray.sweep.gate import GateState, decide, note_scores, record_final
from forge_ray.sweep.halving import AshaConfig, AshaState, stop_reason, value_bounds
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.order import pick


@dataclass(frozen=True, kw_only=True)
class Design:
    """One design of the evidence.

    Attributes:
        key: Its name, unique in the set.
        proxies: Scores of its SID table, those of the hard limits included; `infeasible` with a
            reason where it could not be fitted.
        curve: Validation metric by optimizer step, larger is better; may be empty.
        final: Final metric.
        error: Its standard error, 0 where unknown.
        proxy_cost: Of tokenizer and scores; any unit, the same for all costs.
        train_cost: Of the training up to each step of the curve.
        full_cost: Of the whole training and the final evaluation.
    """

    key: str
    proxies: Mapping[str, Any]
    curve: Mapping[int, float]
    final: float
    error: float
    proxy_cost: float
    train_cost: Mapping[int, float]
    full_cost: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A finished, ungated set of designs.

    Attributes:
        designs: At least one, all with a final value.
        max_steps: Optimizer steps of a full training.
    """

    designs: tuple[Design, ...]
    max_steps: int

    def __post_init__(self) -> None:
        keys = [one.key for one in self.designs]
        if not keys or len(set(keys)) < len(keys):
            raise DataError(f"designs must be at least one with distinct keys, got {keys}.")
        for one in self.designs:
            if not math.isfinite(one.final) or one.curve.keys() != one.train_cost.keys():
                raise DataError(
                    f"design {one.key} must have a final value and a cost for every step of its "
                    f"curve, got {one.final}, {sorted(one.curve)} and {sorted(one.train_cost)}."
                )

    @property
    def best(self) -> Design:
        """The design with the best final value; the first of those that tie."""
        return max(self.designs, key=lambda one: one.final)

    @property
    def full_cost(self) -> float:
        """Cost of training every design to the end."""
        return sum(one.full_cost for one in self.designs)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A way of pruning.

    Attributes:
        name: For tables.
        gate: Before training. Its seed is replaced in each replay.
        asha: During training.
        order: `planned`, or `promising`: all designs are scored first, see `order.pick`.
        budget: Training cost after which the sweep ends; None lets it see every design.
    """

    name: str
    gate: GateConfig
    asha: AshaConfig
    order: Literal["planned", "promising"] = "planned"
    budget: float | None = None


def standard_policies(
    *, gate: GateConfig, asha: AshaConfig, budget: float | None = None
) -> tuple[Policy, ...]:
    """The comparison of the evidence page.

    Args:
        gate: Limits and shares; the mode is set here.
        asha: Rungs; switched on and off here.
        budget: Training cost of `random search`, e.g. what the calibrated gate spent; None leaves
            it out: without a budget it is `no gate`.
    """
    off = dataclasses.replace(asha, enabled=False)
    on = dataclasses.replace(asha, enabled=True)
    modes = {
        mode: dataclasses.replace(gate, mode=mode) for mode in ("off", "quantile", "calibrated")
    }
    policies: tuple[Policy, ...] = (
        Policy(name="no gate", gate=modes["off"], asha=off),
        Policy(name="quantile", gate=modes["quantile"], asha=off),
        Policy(name="calibrated", gate=modes["calibrated"], asha=off),
        Policy(name="ASHA", gate=modes["off"], asha=on),
        Policy(name="quantile + ASHA", gate=modes["quantile"], asha=on),
        Policy(name="calibrated + ASHA", gate=modes["calibrated"], asha=on),
    )
    policies += tuple(
        dataclasses.replace(one, name=f"{one.name}, promising first", order="promising")
        for one in policies
    )
    if budget is None:
        return policies
    return (*policies, Policy(name="random search", gate=modes["off"], asha=off, budget=budget))


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One sweep, replayed.

    Attributes:
        cost_to_best: Training cost until a finished design lay within one standard error of the
            best of the evidence; infinite where none ever did.
        train_cost: Training cost of the whole sweep.
        proxy_cost: Cost of tokenizers and scores of the whole sweep.
        regret: Best final value of the evidence less the best one found; the whole best value where
            nothing was trained to the end.
        pruned_best: Whether the gate pruned the best design.
        stopped_best: Whether halving stopped it.
        num_seen: Designs that came up before the budget was spent.
        num_pruned: Of these, pruned by the gate.
        num_controls: Of these, passed by the gate without a look at their proxies.
    """

    cost_to_best: float
    train_cost: float
    proxy_cost: float
    regret: float
    pruned_best: bool
    stopped_best: bool
    num_seen: int
    num_pruned: int
    num_controls: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Replays of one policy over many orders.

    Attributes:
        name: The policy's.
        num_replays: How many.
        cost_to_best: Median share of the cost of training everything; infinite where most replays
            never came near the best.
        cost_low: 25 % quantile of it.
        cost_high: 75 % quantile of it.
        reached: Share of replays that came within one standard error of the best.
        train_cost: Mean training cost, as a share of training everything.
        regret: Mean regret, in units of the metric.
        pruned_best: Share of replays whose gate pruned the best design.
        pruned_best_high: Its upper limit: one-sided 95 %, Clopper and Pearson. It covers the choice
            of orders, not that of the designs.
        pruned: Mean share of the designs that the gate pruned.
    """

    name: str
    num_replays: int
    cost_to_best: float
    cost_low: float
    cost_high: float
    reached: float
    train_cost: float
    regret: float
    pruned_best: float
    pruned_best_high: float
    pruned: float


def replay(evidence: Evidence, policy: Policy, *, seed: int) -> Replay:
    """One sweep over the designs in an order of its own.

    Args:
        evidence: The designs.
        policy: How to prune.
        seed: Of the order and of the gate's random share; policies with one seed share the order.
    """
    walk = _Walk(evidence, policy, seed=seed)
    order = np.random.default_rng(seed).permutation(len(evidence.designs))
    waiting = [evidence.designs[index] for index in order]
    if policy.order == "promising":
        walk.score(waiting)
    while waiting and (policy.budget is None or walk.train_cost < policy.budget):
        walk.see(waiting.pop(walk.next_place(waiting)))
    return walk.result()


def replay_orders(evidence: Evidence, policy: Policy, *, num_orders: int = 200) -> list[Replay]:
    """Replays with the seeds 0, 1, …: the same orders for every policy."""
    return [replay(evidence, policy, seed=seed) for seed in range(num_orders)]


def summarize(evidence: Evidence, name: str, replays: Sequence[Replay]) -> Summary:
    """Figures over replays, costs as shares of training every design."""
    whole = evidence.full_cost
    # Not interpolated: between a number and infinity there is nothing.
    low, middle, high = np.quantile(
        [one.cost_to_best / whole for one in replays], [0.25, 0.5, 0.75], method="higher"
    )
    lost, num = sum(one.pruned_best for one in replays), len(replays)
    return Summary(
        name=name,
        num_replays=num,
        cost_to_best=float(middle),
        cost_low=float(low),
        cost_high=float(high),
        reached=float(np.mean([math.isfinite(one.cost_to_best) for one in replays])),
        train_cost=float(np.mean([one.train_cost for one in replays])) / whole,
        regret=float(np.mean([one.regret for one in replays])),
        pruned_best=lost / num,
        pruned_best_high=1.0 if lost == num else float(beta.ppf(0.95, lost + 1, num - lost)),
        pruned=float(np.mean([one.num_pruned / max(1, one.num_seen) for one in replays])),
    )


class _Walk:
    """The state of one replay."""

    train_cost: float
    proxy_cost: float

    def __init__(self, evidence: Evidence, policy: Policy, *, seed: int) -> None:
        self._evidence = evidence
        self._gate = dataclasses.replace(policy.gate, seed=seed)
        self._asha = policy.asha
        self._order = policy.order
        self._gate_state, self._asha_state = GateState(), AshaState()
        self._found = -math.inf
        self._cost_to_best = math.inf
        self._goal = evidence.best.final - evidence.best.error
        self.train_cost, self.proxy_cost = 0.0, 0.0

    def score(self, designs: Sequence[Design]) -> None:
        """Pays for the scores of all designs before any of them trains."""
        self.proxy_cost += sum(one.proxy_cost for one in designs)
        scores = {one.key: one.proxies for one in designs}
        note_scores(scores, state=self._gate_state, config=self._gate)

    def next_place(self, waiting: Sequence[Design]) -> int:
        """Which of the waiting designs is next."""
        if self._order == "planned":
            return 0
        picked = self._gate_state.picked
        found = pick(
            [one.proxies for one in waiting],
            turn=len(picked),
            state=self._gate_state,
            config=self._gate,
            stopped=self._bounds(),
        )
        picked[waiting[found.place].key] = found.by
        return found.place

    def see(self, design: Design) -> None:
        """Judges a design and trains it as far as the rules let it."""
        if self._order == "planned":
            self.proxy_cost += design.proxy_cost
        answer = decide(
            design.key,
            design.proxies,
            state=self._gate_state,
            config=self._gate,
            stopped=self._bounds(),
        )
        if not answer.go:
            return
        stop = self._stops_at(design)
        self.train_cost += design.full_cost if stop is None else design.train_cost[stop]
        if stop is not None:
            return
        record_final(design.key, design.final, design.error, state=self._gate_state)
        self._found = max(self._found, design.final)
        if design.final >= self._goal:
            self._cost_to_best = min(self._cost_to_best, self.train_cost)

    def result(self) -> Replay:
        """The replay's figures."""
        decisions, best = self._gate_state.decisions, self._evidence.best
        answer = decisions.get(best.key)
        return Replay(
            cost_to_best=self._cost_to_best,
            train_cost=self.train_cost,
            proxy_cost=self.proxy_cost,
            regret=best.final - (self._found if math.isfinite(self._found) else 0.0),
            pruned_best=answer is not None and not answer["go"],
            stopped_best=best.key in self._asha_state.stopped,
            num_seen=len(decisions),
            num_pruned=sum(not one["go"] for one in decisions.values()),
            num_controls=sum(one["is_control"] for one in decisions.values()),
        )

    def _bounds(self) -> dict[str, float]:
        finals = {key: value for key, (value, _) in self._gate_state.finals.items()}
        return value_bounds(self._asha_state, finals)

    def _stops_at(self, design: Design) -> int | None:
        for step in sorted(design.curve):
            reason = stop_reason(
                design.key,
                step,
                design.curve[step],
                max_steps=self._evidence.max_steps,
                state=self._asha_state,
                config=self._asha,
            )
            if reason is not None:
                return step
        return None
