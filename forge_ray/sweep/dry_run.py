"""What `sweep run` would do: its trials, what they share, what they would take. Writes nothing.

Needs no Ray. Data that is not prepared stays so; the number of items is unknown then, and with it
which designs have too few SIDs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import canonical_json, from_mapping
from forge_ray.data.prepare import find_prepared
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import shared_parts
from forge_ray.sweep.budget import budget_state
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.estimate import StageEstimate, TrialEstimate
from forge_ray.sweep.gate import late_start
from forge_ray.sweep.resolve import Catalogue, check_rungs
from forge_ray.sweep.runner import Planned, plan_trials
from forge_ray.sweep.searcher import TrialSpec
from forge_ray.sweep.space import label_point
from forge_ray.sweep.sweep import make_job, raw_folder, sweep_folder
from forge_ray.sweep.views import STAGES, state_of


@dataclass(frozen=True, kw_only=True)
class Unprepared:
    """A catalogue of which nothing is known yet."""

    key: str = ""
    num_items: int = 0


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a sweep would do.

    Attributes:
        is_prepared: Whether its data is.
        warm_start: What earlier sweeps gave, a line each.
        gate: That the sweep may end before its gate can act; empty where it does not.
        trials: One row per known trial, finished ones first: `trial`, `design`, `state`, `reason`,
            and `seconds` and `cost_usd` ahead of it, None where a stage was never measured.
        rejected: Designs of the space that are no trials, by the rule that they break.
        drawn: Trials that the sampler proposes later, at most.
        shared: One row per kind of artifact: how many the waiting trials need, for how many trials,
            and how many the store has.
        stages: One row per stage over the waiting trials: `trials`, `seconds`, `cost_usd`, and the
            `source` of the figures; `cluster` is what `cluster_hour` adds, trials one by one.
        budget: What is spent and what may be.
    """

    is_prepared: bool
    warm_start: list[str]
    gate: str
    trials: list[dict[str, Any]]
    rejected: dict[str, int]
    drawn: int
    shared: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    budget: dict[str, Any]


def dry_run(config: SweepConfig, store: ArtifactStore) -> DryRun:
    """Plans a sweep as `sweep run` would.

    Raises:
        ConfigError: What `sweep run` would refuse.
    """
    check_rungs(config)
    folder = sweep_folder(config, store)
    raw = config.data or raw_folder(folder)
    is_here = bool(config.data) or Path(raw).exists()
    dataset = find_prepared(raw, store) if is_here else None
    catalogue: Catalogue = dataset or Unprepared()
    planned = plan_trials(make_job(config, store, catalogue, folder))
    waiting = list(planned.source.queue)
    parts = {one.key: _parts(one) for one in waiting if not one.infeasible}
    built = {kind: _built(store, kind, catalogue.key) for kind in ("quantizer", "sids")}
    ahead = _estimates(planned, waiting, parts, built["quantizer"])
    state = budget_state(planned.records, config.budget)
    return DryRun(
        is_prepared=dataset is not None,
        warm_start=planned.warm.lines,
        gate=late_start(
            config.gate, takes_turns=config.takes_turns, num_trials=planned.source.total
        ),
        trials=[
            *_finished_rows(planned),
            *(_waiting_row(one, ahead[one.key], planned) for one in waiting),
        ],
        rejected=dict(planned.source.rejections),
        drawn=planned.source.remaining - len(waiting),
        shared=[_shared_row(kind, parts, built[kind]) for kind in built],
        stages=_stage_rows([ahead[one.key] for one in waiting], config.budget.prices.cluster_hour),
        budget={
            "spent_usd": round(state.spent_usd, 6),
            "max_cost": state.max_cost,
            "spent_hours": round(state.spent_hours, 4),
            "max_hours": state.max_hours,
        },
    )


def _parts(spec: TrialSpec) -> dict[str, str]:
    """By kind of artifact, what decides the one that this trial needs."""
    sid = from_mapping(SidConfig, spec.config["sid"])
    return {kind: canonical_json(part) for kind, part in shared_parts(sid).items()}


def _built(store: ArtifactStore, kind: str, dataset_key: str) -> set[str]:
    """What decided the artifacts of this dataset that the store has."""
    manifests = store.manifests(kind)
    return {canonical_json(one.config) for one in manifests if dataset_key in one.parents}


def _estimates(
    planned: Planned,
    waiting: Sequence[TrialSpec],
    parts: dict[str, dict[str, str]],
    fitted: set[str],
) -> dict[str, TrialEstimate]:
    """What is ahead of each trial; a quantizer counts for the first trial that needs it."""
    times = planned.estimator.times(planned.records)
    seen, ahead = set(fitted), {}
    for spec in waiting:
        whole = planned.estimator.waiting(times, spec, planned.records)
        part = parts.get(spec.key, {}).get("quantizer", "")
        done = ("fit",) if part in seen else ()
        ahead[spec.key] = TrialEstimate(
            stages=tuple(one for one in whole.stages if one.stage not in done)
        )
        seen.add(part)
    return ahead


def _finished_rows(planned: Planned) -> list[dict[str, Any]]:
    return [
        {
            "trial": one.number + 1,
            "design": label_point(one.point),
            "state": state_of(one, is_running=False),
            "seconds": 0.0,
            "cost_usd": 0.0,
            "reason": one.reason,
        }
        for one in planned.records.finished()
    ]


def _waiting_row(spec: TrialSpec, ahead: TrialEstimate, planned: Planned) -> dict[str, Any]:
    record = planned.records.trials.get(spec.key)
    state = "waits" if record is None else f"{state_of(record, is_running=False)}, goes on"
    return {
        "trial": spec.number + 1,
        "design": label_point(spec.point),
        "state": "infeasible" if spec.infeasible else state,
        "seconds": round(ahead.seconds, 1) if ahead.is_known else None,
        "cost_usd": round(ahead.cost_usd, 6) if ahead.is_known else None,
        "reason": spec.infeasible,
    }


def _shared_row(kind: str, parts: dict[str, dict[str, str]], built: set[str]) -> dict[str, Any]:
    needed = [one[kind] for one in parts.values()]
    return {
        "artifact": kind,
        "for trials": len(needed),
        "different": len(set(needed)),
        "in the store": len(set(needed) & built),
        "to build": len(set(needed) - built),
    }


def _stage_rows(waiting: Sequence[TrialEstimate], cluster_hour: float) -> list[dict[str, Any]]:
    rows = []
    for stage in STAGES:
        found = [part for one in waiting for part in one.stages if part.stage == stage]
        rows.append({"stage": stage, "trials": len(found), **_sums(found)})
    whole = _sums([part for one in waiting for part in one.stages])
    if cluster_hour and whole["seconds"] is not None:
        usd = sum(one.whole_usd(cluster_hour) - one.cost_usd for one in waiting)
        part = {"trials": len(waiting), "cost_usd": round(usd, 6)}
        rows.append({"stage": "cluster", **whole, **part})
        whole["cost_usd"] = round(whole["cost_usd"] + usd, 6)
    return [*rows, {"stage": "in all", "trials": len(waiting), **whole}]


def _sums(parts: Sequence[StageEstimate]) -> dict[str, Any]:
    """Sums where every part is known; where one is not there is no sum."""
    is_known = all(one.seconds is not None for one in parts)
    return {
        "seconds": round(sum(one.seconds or 0.0 for one in parts), 1) if is_known else None,
        "cost_usd": round(sum(one.cost_usd or 0.0 for one in parts), 6) if is_known else None,
        "source": ", ".join(dict.fromkeys(one.source for one in parts)),
    }
