"""How many trials a cluster holds at a time, and whether one fits at all; decided before any work.

Knows resources by Ray's names and nodes by their labels, not what stages do. The answer is for a
cluster that holds nothing else: what does not fit an empty cluster never will.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from forge_ray.errors import ConfigError

T = TypeVar("T")

_PLAIN = frozenset({"CPU", "memory", "object_store_memory"})
_SLACK = 1e-6
"""Sums of fractions of a CPU are not exact."""
_LOOKS = 50_000
"""At nodes, before a packing that is not found counts as one that is not there."""
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
    """How often a stage fits on empty nodes beside its shared tasks, at most `limit` times.

    The order of bundles and nodes does not matter.
    """
    room = _Room(nodes)

    def is_too_many(count: int) -> bool:
        held = (replace(one, num=one.num * count) for one in demand.held)
        return not room.holds([*demand.shared, *held])

    return bisect.bisect_left(range(1, limit + 1), True, key=is_too_many)


class _Room:
    """Empty nodes that bundles are packed into."""

    def __init__(self, nodes: Sequence[Nodes]) -> None:
        self._nodes = [one for one in sorted(nodes, key=_rank) for _ in range(one.num)]
        self._total = _sum((one.resources, 1) for one in self._nodes)

    def holds(self, bundles: Sequence[Bundle]) -> bool:
        """Whether all of them find a place beside each other.

        Those with the fewest nodes to choose from come first, of these the largest, each on the
        first node where it fits; where one finds none, the ones before it try other nodes. That is
        exact until it has looked `_LOOKS` times, then the answer is no.
        """
        asked = _sum((one.resources, one.num) for one in bundles)
        if not _fits(asked, self._total):
            return False
        options = [(one, self._homes(one)) for one in bundles if one.num]
        options.sort(key=lambda one: (len(one[1]), -self._share(one[0])))
        items = [(bundle, homes) for bundle, homes in options for _ in range(bundle.num)]
        free = [dict(one.resources) for one in self._nodes]
        looks = _LOOKS + len(items) + sum(len(homes) for _, homes in options)
        places: list[int] = []
        """Of each item that is placed, where in its homes."""
        start = 0
        while len(places) < len(items):
            bundle, homes = items[len(places)]
            place = _first(bundle, homes, free, start)
            looks -= (len(homes) if place is None else place) - start + 1
            if place is not None:
                _add(free[homes[place]], bundle, -1)
                places.append(place)
                # Of equal ones none goes before another: that would be the same packing.
                is_same = len(places) < len(items) and items[len(places)][0] is bundle
                start = place if is_same else 0
            elif places and looks > 0:
                bundle, homes = items[len(places) - 1]
                _add(free[homes[places[-1]]], bundle, 1)
                start = places.pop() + 1
            else:
                return False
        return True

    def _homes(self, bundle: Bundle) -> list[int]:
        return [
            place
            for place, one in enumerate(self._nodes)
            if _fits(bundle.resources, one.resources) and selects(bundle.labels, one.labels)
        ]

    def _share(self, bundle: Bundle) -> float:
        """What it takes of all nodes together, of the resource of which it takes most."""
        asked = [(self._total[name], one) for name, one in bundle.resources.items() if one > 0]
        return max((one / total for total, one in asked), default=0.0)


def _first(
    bundle: Bundle, homes: Sequence[int], free: Sequence[Mapping[str, float]], start: int
) -> int | None:
    for place in range(start, len(homes)):
        if _fits(bundle.resources, free[homes[place]]):
            return place
    return None


def _fits(asked: Mapping[str, float], free: Mapping[str, float]) -> bool:
    return all(
        free.get(name, 0.0) + _SLACK >= amount for name, amount in asked.items() if amount > 0
    )


def _sum(parts: Iterable[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for resources, num in parts:
        for name, amount in resources.items():
            total[name] += num * amount
    return total


def _add(free: dict[str, float], bundle: Bundle, times: int) -> None:
    for name, amount in bundle.resources.items():
        if amount > 0:
            free[name] += times * amount


def _rank(node: Nodes) -> tuple[int, list[tuple[str, float]], list[tuple[str, str]]]:
    """Plain work leaves nodes with GPUs to those that need them, as Ray's scheduler does."""
    specials = sum(name not in _PLAIN for name in node.resources)
    return specials, sorted(node.resources.items()), sorted(node.labels.items())


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
