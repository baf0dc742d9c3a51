"""What a sweep would do, and where it stopped at its budget, for the terminal."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.console import emit, stderr
from forge_ray.sweep.budget import budget_state
from forge_ray.sweep.config import BudgetConfig, SweepConfig
from forge_ray.sweep.ledger import SweepRecords
from forge_ray.sweep.plan import describe_rejections


def show_dry_run(config: SweepConfig, store: ArtifactStore, *, as_json: bool) -> None:
    """Prints what `sweep run` would do."""
    from forge_ray.sweep.dry_run import dry_run

    found = dry_run(config, store)
    if as_json:
        emit(dataclasses.asdict(found), title="", as_json=True)
        return
    if not found.is_prepared:
        _say(
            "the data is not prepared: which designs have too few SIDs, and what the store has, "
            "shows once it is"
        )
    for line in (*found.warm_start, found.gate):
        if line:
            _say(line)
    emit(_with_values(found.trials), title=f"{config.name}: trials", as_json=False)
    if found.rejected:
        _say(f"{describe_rejections(Counter(found.rejected))}; they are no trials")
    if found.drawn:
        _say(f"and up to {found.drawn} that the sampler {config.sampler.kind} draws as it learns")
    emit(found.shared, title="what the waiting trials share", as_json=False)
    emit(found.stages, title="ahead at most (no trial pruned), one by one", as_json=False)
    limits = [("USD", "spent_usd", "max_cost"), ("hours", "spent_hours", "max_hours")]
    for unit, spent, most in limits:
        if found.budget[most] is not None:
            _say(f"budget: {found.budget[spent]:.4g} of {found.budget[most]:g} {unit} are spent")


def show_stop(records: SweepRecords, budget: BudgetConfig) -> None:
    """Prints where the last session stopped at the budget, if it did, and what comes next."""
    state = budget_state(records, budget)
    if state.stopped is None:
        return
    _say(f"stopped at the budget. {state.stopped['reason']}")
    if state.stopped["next"]:
        title = f"next of {state.stopped['left']} trials, with a larger budget"
        emit(state.stopped["next"], title=title, as_json=False)
    else:
        _say(f"next: up to {state.stopped['left']} trials that the sampler draws")
    _say("raise budget.max_cost or budget.max_hours; the same command continues")


def _with_values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the columns that are empty in all of them."""
    names = {name for row in rows for name, value in row.items() if value not in ("", None)}
    return [{name: value for name, value in row.items() if name in names} for row in rows]


def _say(text: str) -> None:
    stderr.print(text, soft_wrap=True, markup=False, highlight=False)
