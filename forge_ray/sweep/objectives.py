"""What a sweep aims at: the metric, and beside it facts and costs that should be small.

Pure functions of trial records. The first objective is the sweep's metric, which alone ranks trials
and drives gate and halving; all of them together span the Pareto front.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from forge_ray.errors import ConfigError
from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.limits import is_finite
from forge_ray.sweep.prices import Prices, trial_cost

FACTS = ("sid_bits", "tokens_per_item")
"""Known of a design before any work: log2 of its SID space, and codes that spell an item."""

COSTS: Mapping[str, Callable[[TrialRecord, Prices], float]] = {
    "seconds": lambda record, _: sum(record.seconds.values()),
    "cpu_seconds": lambda record, _: sum(record.held("CPU").values()),
    "gpu_seconds": lambda record, _: sum(record.held("GPU").values()),
    "cost_usd": lambda record, prices: trial_cost(record, prices),
}
"""What a trial took over all its attempts; a stage that the store answered costs nothing."""

_METRIC = re.compile(
    r"((ItemNDCG|ItemHit|SidHit)@(?P<k>[1-9]\d*)(/(head|tail|cold))?)|(coverage@(?P<n>[1-9]\d*))"
)


def direction(objective: str) -> int:
    """+1 where larger is better (metrics of the final row), -1 where smaller is (facts, costs).

    Raises:
        ConfigError: No such objective.
    """
    if objective in FACTS or objective in COSTS:
        return -1
    if _METRIC.fullmatch(objective):
        return 1
    raise ConfigError(
        f"objectives must name metrics such as ItemNDCG@10 or ItemNDCG@10/tail, or one of "
        f"{', '.join((*FACTS, *COSTS))}, got {objective!r}. Check the name."
    )


def cutoff(objective: str) -> int | None:
    """The k of a metric, None for a fact or a cost."""
    match = _METRIC.fullmatch(objective)
    return int(match["k"] or match["n"]) if match else None


def objective_values(
    record: TrialRecord, objectives: Sequence[str], prices: Prices
) -> dict[str, float] | None:
    """The objectives of a complete trial by name, or None where the record lacks one."""
    found = {name: _value(record, name, prices) for name in objectives}
    values = {name: float(value) for name, value in found.items() if is_finite(value)}
    return values if record.state == "complete" and len(values) == len(found) else None


def pareto_front(
    records: Iterable[TrialRecord], objectives: Sequence[str], prices: Prices
) -> list[TrialRecord]:
    """Complete trials that no other one beats in one objective without losing in another.

    Args:
        records: Trials; those that are not complete or lack an objective are left out.
        objectives: Names, see `direction`.
        prices: What `cost_usd` is counted by.

    Returns:
        The front, best first objective first; designs with equal values all belong to it.
    """
    signs = [direction(name) for name in objectives]
    rows: list[tuple[tuple[float, ...], TrialRecord]] = []
    for record in records:
        values = objective_values(record, objectives, prices)
        if values is not None:
            turned = zip(signs, values.values(), strict=True)
            rows.append((tuple(sign * value for sign, value in turned), record))
    front = [row for row in rows if not any(_dominates(other[0], row[0]) for other in rows)]
    front.sort(key=lambda row: (*(-value for value in row[0]), row[1].number))
    return [record for _, record in front]


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(one >= other for one, other in pairs) and any(one > other for one, other in pairs)


def _value(record: TrialRecord, objective: str, prices: Prices) -> Any:
    if objective in FACTS:
        return record.facts.get(objective)
    if objective in COSTS:
        return COSTS[objective](record, prices)
    return record.final.get(objective)
