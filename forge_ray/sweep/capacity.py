"""How many trials a cluster holds at a time, and whether one fits at all; decided before any work.

Knows resources by Ray's names and nodes by their labels, not what stages do. The answer is for a
cluster that holds nothing else: what does not fit an empty cluster never will.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from forge_ray.errors import ConfigError

T = TypeVar("T")

_PLAIN = frozenset({"CPU", "memory", "object_store_memory"})
_SLACK = 1e-6
"""Sums of fractions of a CPU are not exact."""
_GIB = 1024.0**3


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What one process asks of one node.

    Attributes:
        resources: Amounts by Ray's names; memory in bytes.
        labels: Selector of node labels.
        num: How many such processes there are.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    num: int = 1

    def __str__(self) -> str:
        where = f" on nodes with {_pairs(self.labels)}" if self.labels else ""
        return f"{self.num} x {amounts(self.resources)}{where}"


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a stage of a trial holds at one time.

    Attributes:
        stage: Its name.
        held: Processes of each trial in this stage.
        shared: Short tasks that the stage waits for; trials take turns.
    """

    stage: str
    held: tuple[Bundle, ...]
    shared: tuple[Bundle, ...] = ()

    def __str__(self) -> str:
        return f"{self.stage}: " + ", ".join(str(one) for one in (*self.held, *self.shared))


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Nodes that are alike.

    Attributes:
        resources: Of each, by Ray's names.
        labels: Of each.
        num: How many.
        is_up: Whether they run; the autoscaler may add the others.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    num: int = 1
    is_up: bool = True

    def __str__(self) -> str:
        text = f"{self.num} x {amounts(self.resources)}"
        text += f" with {_pairs(self.labels)}" if self.labels else ""
        return text if self.is_up else f"{text} (autoscaler)"


def check_fits(demands: Iterable[Demand], nodes: Sequence[Nodes]) -> None:
    """Refuses a stage that no empty cluster of these nodes could ever place.

    Raises:
        ConfigError: With what it asks for and what there is.
    """
    for demand in demands:
        if not copies(demand, nodes, limit=1):
            there = "; ".join(str(one) for one in nodes) or "no node"
            raise ConfigError(
                f"resources must fit one trial on the cluster, got {demand} where there is {there}."
                " Lower what gr and resources ask for, or add nodes; those that an autoscaler adds "
                "count where resources.autoscaled names them."
            )


def at_once(demands: Sequence[Demand], nodes: Sequence[Nodes], *, limit: int) -> int:
    """Trials that may run beside each other in any mix of stages, at least 1.

    The tasks that stages wait for keep their place whatever the trials hold: a training that took
    the last CPU would let every other trial wait for its end.

    Args:
        demands: Of one trial, by stage; each of them fits (`check_fits`).
        nodes: Of the cluster.
        limit: Largest answer wanted.
    """
    shared = distinct(bundle for one in demands for bundle in one.shared)
    counts = [
        copies(Demand(stage=one.stage, held=one.held, shared=tuple(shared)), nodes, limit=limit)
        for one in demands
    ]
    return max(1, min(counts, default=limit))


def copies(demand: Demand, nodes: Sequence[Nodes], *, limit: int) -> int:
    """How often a stage fits on empty nodes beside its shared tasks, at most `limit` times."""
    room = _Room(nodes)
    if not all(room.take(one) for one in demand.shared):
        return 0
    count = 0
    while count < limit and all(room.take(one) for one in demand.held):
        count += 1
    return count


class _Room:
    """What is free while bundles are placed, each on the first node where it fits."""

    def __init__(self, nodes: Sequence[Nodes]) -> None:
        # Plain work leaves nodes with GPUs to those that need them, as Ray's scheduler does.
        order = sorted(nodes, key=lambda one: sum(name not in _PLAIN for name in one.resources))
        self._free = [(dict(one.resources), one.labels) for one in order for _ in range(one.num)]

    def take(self, bundle: Bundle) -> bool:
        return all(self._take_one(bundle) for _ in range(bundle.num))

    def _take_one(self, bundle: Bundle) -> bool:
        asked = {name: amount for name, amount in bundle.resources.items() if amount > 0}
        for free, labels in self._free:
            fits = all(free.get(name, 0.0) + _SLACK >= amount for name, amount in asked.items())
            if fits and selects(bundle.labels, labels):
                for name, amount in asked.items():
                    free[name] -= amount
                return True
        return False


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels answers a selector of Ray: `x`, `!x`, `in(x, y)`, `!in(…)`.

    A node without the label answers the negations.
    """
    for name, wanted in selector.items():
        is_negated, rest = wanted.startswith("!"), wanted.removeprefix("!")
        inner = rest.removeprefix("in").strip()
        is_list = inner.startswith("(") and inner.endswith(")")
        values = [one.strip() for one in inner[1:-1].split(",")] if is_list else [rest]
        if (labels.get(name) in values) is is_negated:
            return False
    return True


def distinct(things: Iterable[T]) -> list[T]:
    """Each once, in order; they need not be hashable."""
    found: list[T] = []
    for one in things:
        if one not in found:
            found.append(one)
    return found


def amounts(resources: Mapping[str, float]) -> str:
    """Resources for people: `{CPU: 4, GPU: 1, memory: 2.0 GiB}`."""
    shown = {
        name: f"{value / _GIB:.1f} GiB" if name.endswith("memory") else f"{value:g}"
        for name, value in resources.items()
        if value > 0 and name != "object_store_memory"
    }
    return f"{{{_pairs(shown)}}}"


def _pairs(mapping: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in mapping.items())
