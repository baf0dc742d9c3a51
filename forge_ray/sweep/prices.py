"""What compute costs: the price table of a sweep file, applied to what trials held.

A stage costs its seconds times the share of a node that it held. Not counted: nodes that are up and
idle. Where a cluster is paid for whether it works or not, set `cluster_hour` and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from forge_ray.sweep.ledger import TrialRecord

_HOUR_S = 3600.0


@dataclass(kw_only=True)
class NodePrice:
    """A type of node. A stage pays for the larger of its shares of the CPUs and of the GPUs."""

    hour: float = 0.0
    """Price of the whole node for an hour, USD."""
    cpus: float = 0.0
    """CPUs of the node."""
    gpus: float = 0.0
    """GPUs of the node; 0 for none."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray node labels that tell it, all of them, e.g. `ray.io/accelerator-type: A100`,
    `ray.io/market-type: spot`, `ray.io/node-group: workers`; empty matches every node."""

    def __post_init__(self) -> None:
        if self.hour < 0 or self.cpus <= 0 or self.gpus < 0:
            raise ConfigError(
                "budget.prices.nodes.* must have hour >= 0, cpus > 0 and gpus >= 0, got "
                f"hour={self.hour}, cpus={self.cpus}, gpus={self.gpus}. Give the node's size."
            )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels is of this type."""
        return all(labels.get(name) == value for name, value in self.labels.items())

    def per_hour(self, cpus: float, gpus: float) -> float:
        """Price of holding this much of such a node for an hour; all its GPUs hold the node."""
        share = gpus / self.gpus if self.gpus else 0.0
        return self.hour * max(cpus / self.cpus, share)


@dataclass(kw_only=True)
class Prices:
    """Prices in USD (or any one currency); all 0 unless set, nothing is assumed."""

    cpu_hour: float = 0.0
    """A CPU for an hour, on nodes that no entry of `nodes` matches."""
    gpu_hour: float = 0.0
    """A GPU for an hour, on nodes that no entry of `nodes` matches."""
    cluster_hour: float = 0.0
    """An hour of the sweep, whatever its trials do: the head node, or a cluster rented whole."""
    nodes: dict[str, NodePrice] = field(default_factory=dict)
    """Types of nodes by name; the first that matches the node where a stage ran counts."""

    def __post_init__(self) -> None:
        if min(self.cpu_hour, self.gpu_hour, self.cluster_hour) < 0:
            raise ConfigError(
                "budget.prices must be >= 0, got "
                f"{self.cpu_hour}, {self.gpu_hour}, {self.cluster_hour}. Leave unknown ones out."
            )

    @property
    def is_set(self) -> bool:
        """Whether anything costs something."""
        flat = self.cpu_hour or self.gpu_hour or self.cluster_hour
        return bool(flat or any(one.hour for one in self.nodes.values()))

    def dearest(self, *, cpus: float, gpus: float) -> dict[str, str]:
        """Labels of the node on which CPUs and GPUs cost most; those of none by the flat prices."""
        candidates: list[dict[str, str]] = [{}, *(one.labels for one in self.nodes.values())]
        return max(
            candidates, key=lambda labels: self.per_second(cpus=cpus, gpus=gpus, labels=labels)
        )

    def per_second(self, *, cpus: float, gpus: float, labels: Mapping[str, str]) -> float:
        """Price of holding CPUs and GPUs for a second on a node with these labels."""
        for node in self.nodes.values():
            if node.matches(labels):
                return node.per_hour(cpus, gpus) / _HOUR_S
        return (cpus * self.cpu_hour + gpus * self.gpu_hour) / _HOUR_S


def trial_cost(record: TrialRecord, prices: Prices) -> float:
    """USD that a trial has cost so far, all its starts together; its share of no `cluster_hour`.

    An artifact that was reused costs the seconds that it took to open, which are next to nothing.
    """
    return sum(stage_costs(record, prices).values())


def stage_costs(record: TrialRecord, prices: Prices) -> dict[str, float]:
    """USD by stage: seconds x what the stage held x the price where it ran."""
    # Records of earlier versions know no places.
    starts = itertools.zip_longest(record.attempts, record.places)
    costs: dict[str, float] = {}
    for seconds, places in ((record.prior, record.prior_places), *starts):
        spent = cost_of(
            seconds, cpus=record.cpus, gpus=record.gpus, places=places or {}, prices=prices
        )
        for stage, value in spent.items():
            costs[stage] = costs.get(stage, 0.0) + value
    return costs


def cost_of(
    seconds: Mapping[str, float],
    *,
    cpus: Mapping[str, float],
    gpus: Mapping[str, float],
    places: Mapping[str, Mapping[str, str]],
    prices: Prices,
) -> dict[str, float]:
    """USD by stage of one start; every argument is by stage, what is missing counts as none."""
    return {
        stage: value
        * prices.per_second(
            cpus=cpus.get(stage, 0.0), gpus=gpus.get(stage, 0.0), labels=places.get(stage, {})
        )
        for stage, value in seconds.items()
    }
