"""A finished, ungated sweep as evidence: which proxies rank its designs, and designs to replay.

Pure functions over trial records; `replay` walks through what is made here. Compute is counted in
full trainings (optimizer steps over `max_steps`), not in seconds: seconds also measure what else
the machine was doing. Trials that repeat a design with another seed are no designs of their own;
they say how far two trainings of one design lie apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forge_ray.config import canonical_json
from forge_ray.errors import DataError
from forge_ray.sid.metrics.registry import Metric, audited, find_metric
from forge_ray.sweep.correlation import RankCorrelation, correlate
from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.limits import is_finite
from forge_ray.sweep.replay import Design, Evidence
from forge_ray.sweep.space import Point, label_point

SEEDS = ("sid.seed", "gr.seed")
"""Names whose values make a second training of a design, not another design."""

CONTROLS = ("random", "shuffled")
"""Quantizers without meaning."""

BEFORE_RESOLUTION = ("raw_gini", "raw_uniqueness", "raw_colliding_items", "raw_max_bucket")
"""Figures of the table before collisions were resolved, beside those that a sweep audits."""


@dataclass(frozen=True, kw_only=True)
class ProxyRanking:
    """How one proxy ranks the designs of a group.

    Attributes:
        proxy: Its name.
        group: Which designs.
        num_designs: With both values.
        correlation: With the final metric, the proxy turned so that + is good.
        regret: Best final value of the group less that of the design which the proxy ranks first
            (mean over ties).
    """

    proxy: str
    group: str
    num_designs: int
    correlation: RankCorrelation
    regret: float


@dataclass(frozen=True, kw_only=True)
class SeedSpread:
    """What other seeds of SIDs and generator change.

    Attributes:
        designs: Labels of the designs that were trained more than once.
        values: Their final values, first seeds first.
    """

    designs: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def deviation(self) -> float:
        """Standard deviation of one training, pooled over the designs; NaN without any."""
        if not self.values:
            return math.nan
        squares = sum(float(np.var(one)) * len(one) for one in self.values)
        return math.sqrt(squares / sum(len(one) - 1 for one in self.values))


def designs_of(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The complete trials of a sweep, first seeds only, in order of start.

    Raises:
        DataError: A trial is not complete: evidence with gaps is chosen evidence.
    """
    found = sorted(records, key=lambda one: one.number)
    open_ones = [one.number + 1 for one in found if one.state != "complete" or one.value is None]
    if open_ones:
        raise DataError(
            f"trials of the evidence must all be complete, got {len(open_ones)} others: "
            f"{open_ones}. Run the sweep to its end with gate.mode=off and asha.enabled=false."
        )
    first: dict[str, TrialRecord] = {}
    for one in found:
        first.setdefault(_design_key(one), one)
    return list(first.values())


def seed_spread(records: Iterable[TrialRecord]) -> SeedSpread:
    """Trials that differ in their seeds alone, together."""
    groups: dict[str, list[TrialRecord]] = {}
    for one in sorted(records, key=lambda one: one.number):
        if one.value is not None:
            groups.setdefault(_design_key(one), []).append(one)
    repeated = [group for group in groups.values() if len(group) > 1]
    return SeedSpread(
        designs=tuple(label_point(_without_seeds(group[0])) for group in repeated),
        values=tuple(tuple(float(one.value or 0.0) for one in group) for group in repeated),
    )


def is_control(record: TrialRecord) -> bool:
    """Whether the design's codes carry no meaning."""
    return record.point.get("sid.quantizer.kind") in CONTROLS


def is_one_to_one(record: TrialRecord) -> bool:
    """Whether every item has a SID of its own after resolution."""
    return record.proxies.get("uniqueness") == 1


GROUPS: Mapping[str, Callable[[TrialRecord], bool]] = {
    "all": lambda _: True,
    "without controls": lambda one: not is_control(one),
    "one item a SID, without controls": lambda one: is_one_to_one(one) and not is_control(one),
}
"""Designs over which proxies are compared: controls alone can make any probe look good."""


def rank_proxies(designs: Sequence[TrialRecord]) -> list[ProxyRanking]:
    """Every proxy against the final metric, in every group of designs."""
    metrics = [*audited(), *(find_metric(name) for name in BEFORE_RESOLUTION)]
    names = [*(one.name for one in audited()), *BEFORE_RESOLUTION]
    rankings = []
    for group, belongs in GROUPS.items():
        members = [one for one in designs if belongs(one)]
        for name, metric in zip(names, metrics, strict=True):
            assert metric is not None
            found = _rank(name, metric, members, group)
            if found is not None:
                rankings.append(found)
    return rankings


def evidence_of(designs: Sequence[TrialRecord], *, metric: str, max_steps: int) -> Evidence:
    """The designs as `replay` wants them; costs in full trainings.

    Args:
        designs: Complete trials.
        metric: Validation metric of curve and final value.
        max_steps: Optimizer steps of a full training.
    """
    whole = statistics.median(_seconds(one, "train", "evaluate") for one in designs)
    return Evidence(
        designs=tuple(_design(one, metric, max_steps, whole) for one in designs),
        max_steps=max_steps,
    )


def _design(record: TrialRecord, metric: str, max_steps: int, whole: float) -> Design:
    curve = {
        int(row["global_step"]): float(row[metric])
        for row in record.history
        if row.get(metric) is not None  # it was no number
    }
    return Design(
        key=record.key,
        proxies=record.proxies,
        curve=curve,
        final=float(record.value or 0.0),
        error=float(record.final.get(f"{metric}_se") or 0.0),
        proxy_cost=_seconds(record, "fit", "score") / whole if whole else 0.0,
        train_cost={step: step / max_steps for step in curve},
        full_cost=1.0,
    )


def _rank(
    name: str, metric: Metric, members: Sequence[TrialRecord], group: str
) -> ProxyRanking | None:
    pairs = [
        (metric.sign * float(one.proxies[name]), float(one.value))
        for one in members
        if one.value is not None and is_finite(one.proxies.get(name))
    ]
    if len(pairs) < 2:
        return None
    proxy, final = np.array(pairs, dtype=np.float64).T
    chosen = final[proxy == proxy.max()].mean()
    return ProxyRanking(
        proxy=name,
        group=group,
        num_designs=len(pairs),
        correlation=correlate(proxy, final),
        regret=float(final.max() - chosen),
    )


def _without_seeds(record: TrialRecord) -> Point:
    return {name: value for name, value in record.point.items() if name not in SEEDS}


def _design_key(record: TrialRecord) -> str:
    # Not its label, which shows three digits of a number.
    return canonical_json(_without_seeds(record))


def _seconds(record: TrialRecord, *stages: str) -> float:
    return sum(record.seconds.get(stage, 0.0) for stage in stages)
