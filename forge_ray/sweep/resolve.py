"""From a point of the space to a trial: its typed configuration, its key, whether it can work."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import from_mapping, to_mapping
from forge_ray.errors import ConfigError
from forge_ray.gr.config import GrConfig
from forge_ray.sid.config import SidConfig
from forge_ray.sid.resolvers import ExtraTokenConfig, PopRankConfig
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.halving import late_enough
from forge_ray.sweep.limits import infeasible_reason
from forge_ray.sweep.objectives import cutoff
from forge_ray.sweep.searcher import Rejection, Resolved
from forge_ray.sweep.space import Point, apply_point

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrialConfig:
    """Everything a trial computes from the dataset."""

    sid: SidConfig = field(default_factory=SidConfig)
    """SIDs, as in `forge-ray sid fit`."""
    gr: GrConfig = field(default_factory=GrConfig)
    """The generator, as in `forge-ray gr train`."""


def trial_config(config: SweepConfig, point: Point) -> TrialConfig:
    """The sweep's settings with a point applied.

    Raises:
        ConfigError: The result is no valid configuration.
    """
    return from_mapping(TrialConfig, apply_point({"sid": config.sid, "gr": config.gr}, point))


def check_rungs(config: SweepConfig) -> None:
    """Refuses to search what the rungs of halving are made of: all trials share them.

    Warns of a first rung so early that halving is likely to stop the best design.

    Raises:
        ConfigError: The space or a fixed point varies the steps of training or of its reports.
    """
    if not config.asha.enabled:
        return
    entries = [("space", config.space)]
    entries += [(f"points[{index}]", point) for index, point in enumerate(config.points)]
    for where, names in entries:
        for name in names:
            # A name above one of these replaces it too.
            if any(f"{fixed}.".startswith(f"{name}.") for fixed in _RUNG_SETTINGS):
                raise ConfigError(
                    f"{where} must not vary {' or '.join(_RUNG_SETTINGS)}, got {name}: asha "
                    "compares trials at the same steps. Set it once under gr for all trials, or "
                    "set asha.enabled=false."
                )
    early, max_steps = config.asha.grace_steps, trial_config(config, {}).gr.max_steps
    if 0 < early < late_enough(max_steps):
        logger.warning(
            "asha.grace_steps should be at least a third of gr.max_steps (%d), got %d: good "
            "designs may learn slowly, and a first rung at a sixth stopped the best one in most "
            "replays (docs/evidence.md). Leave it out for a third.",
            late_enough(max_steps),
            early,
        )


_RUNG_SETTINGS = ("gr.max_steps", "gr.validation.every")


class Catalogue(Protocol):
    """What a design needs to know of a dataset; every `Dataset` says it."""

    @property
    def key(self) -> str:
        """Its content key."""

    @property
    def num_items(self) -> int:
        """Items that need a SID."""


def resolve_point(config: SweepConfig, point: Point, *, dataset: Catalogue) -> Resolved:
    """A point as configuration and key; the key ignores where stages run.

    Raises:
        ConfigError: The point makes no valid configuration.
    """
    typed = trial_config(config, point)
    if typed.gr.max_workers:
        raise ConfigError(
            f"gr.max_workers must be 0 in a sweep, got {typed.gr.max_workers}: trials that grow "
            "take the workers of others. Set gr.num_workers."
        )
    if typed.gr.in_process:
        raise ConfigError(
            "gr.in_process must be false in a sweep, got true: a trial's own process holds no "
            "CPUs. Leave it out."
        )
    if not typed.gr.tasks.prompts.histories:
        raise ConfigError(
            "gr.tasks.next_item must be > 0 in a sweep, got 0: its designs are ranked on the next "
            "items of users. Give it a weight."
        )
    if not typed.gr.validation.exclude_seen:
        raise ConfigError(
            "gr.validation.exclude_seen must be true in a sweep, got false: its evaluations leave "
            "seen items out, and trials are compared by both. Leave it out."
        )
    typed.gr.model.check_history(typed.gr.max_history)
    typed.gr.check_targets()
    _check_metric(config.metric, "gr.validation.ks", typed.gr.validation.ks)
    _check_metric(config.metric, "evaluation.ks", config.evaluation.ks)
    _check_cutoffs(config.objectives, config.evaluation.ks)
    mapping = to_mapping(typed)
    sid = {name: value for name, value in mapping["sid"].items() if name != "encode"}
    content = {"sid": sid, "gr": typed.gr.identity()}
    sizes = typed.sid.quantizer.codebook_sizes
    infeasible = infeasible_reason(sizes, dataset.num_items, config.gate) or ""
    facts = sid_facts(typed.sid)
    return Resolved(
        key=ArtifactStore.key("trial", content, parents=(dataset.key,)),
        config=mapping,
        infeasible=infeasible,
        facts=facts,
        rejected=_rejection(config, facts["sid_bits"], infeasible),
    )


def _rejection(config: SweepConfig, bits: float, infeasible: str) -> Rejection | None:
    limits = config.constraints
    # log2 of sizes that are no powers of two rounds.
    if limits.max_sid_bits is not None and bits > limits.max_sid_bits + 1e-9:
        reason = f"{bits:.4g} bits > constraints.max_sid_bits {limits.max_sid_bits:g}"
        return Rejection(rule="max_sid_bits", reason=reason)
    if limits.min_sid_bits is not None and bits < limits.min_sid_bits - 1e-9:
        reason = f"{bits:.4g} bits < constraints.min_sid_bits {limits.min_sid_bits:g}"
        return Rejection(rule="min_sid_bits", reason=reason)
    if infeasible and config.gate.mode != "off":
        return Rejection(rule="capacity", reason=infeasible)
    return None


def sid_facts(sid: SidConfig) -> dict[str, float]:
    """What a design is known for before any work; names as in `forge_ray.sweep.objectives.FACTS`.

    The level that a resolver appends spells an item and is no part of the SID space: its size is
    that of the fullest bucket, which only fitting finds.
    """
    sizes = sid.quantizer.codebook_sizes
    appended = isinstance(sid.resolver, (ExtraTokenConfig, PopRankConfig))
    return {
        "sid_bits": sum(math.log2(size) for size in sizes),
        "tokens_per_item": len(sizes) + int(appended),
    }


def _check_metric(metric: str, where: str, ks: Sequence[int]) -> None:
    # Refused here: a metric that no row holds would fail each trial after its training began.
    known = [f"{name}@{k}" for name in ("ItemNDCG", "ItemHit") for k in ks]
    if metric not in known:
        raise ConfigError(
            f"metric must be among {', '.join(known)}, got {metric!r}. "
            f"Set one of them, or add its cut-off to {where}."
        )


def _check_cutoffs(objectives: Sequence[str], ks: Sequence[int]) -> None:
    for name in objectives:
        k = cutoff(name)
        if k is not None and k not in ks:
            raise ConfigError(
                f"objectives must use a cut-off of evaluation.ks ({', '.join(map(str, ks))}), got "
                f"{name!r}. Add {k} to evaluation.ks."
            )
