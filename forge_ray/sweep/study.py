"""The Optuna side of a sweep's memory: its storage, its study, and what a killed driver left there.

A study belongs to one definition of the space, because Optuna refuses a parameter whose choices
change; the finished trials that the new space contains are copied into the new study.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from forge_ray.config import canonical_json
from forge_ray.errors import ConfigError
from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.patient_storage import PatientStorage
from forge_ray.sweep.space import Space

KEY = "trial_key"
"""Optuna user attribute that holds the trial key."""

POPULATION = 16
"""Trials of a generation of `nsga2`: Optuna's 50 would be the whole of most sweeps."""

_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def open_storage(url: str, folder: Path) -> BaseStorage:
    """The storage that a sweep file names; empty keeps a SQLite file in `folder`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url.endswith(".journal"):
        return JournalStorage(JournalFileBackend(url))
    if not url:
        folder.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{folder / 'optuna.db'}"
    if "://" not in url:
        raise ConfigError(
            f"storage must be a database URL or a .journal path, got {url!r}. "
            "Write sqlite:///path/optuna.db."
        )
    # SQLite waits for a reader (a dashboard) before it says that it is locked.
    options = {"connect_args": {"timeout": 10}} if url.startswith("sqlite") else {}
    return PatientStorage(url, engine_kwargs=options)


def study_name(sweep: str, definition: Mapping[str, Any]) -> str:
    """Name of the study for one definition of the space."""
    digest = hashlib.sha256(canonical_json(dict(definition)).encode()).hexdigest()
    return f"{sweep}-{digest[:8]}"


def make_sampler(kind: str, *, seed: int) -> BaseSampler:
    """The Optuna sampler behind a sampler kind; planned kinds enqueue every point themselves."""
    if kind == "tpe":
        return TPESampler(seed=seed)
    if kind == "gp":
        # Parameters that not every trial has are drawn on their own: no news to anyone.
        return GPSampler(seed=seed, warn_independent_sampling=False)
    if kind == "nsga2":
        return NSGAIISampler(seed=seed, population_size=POPULATION)
    return RandomSampler(seed=seed)


def close_unfinished(storage: BaseStorage, sweep: str, records: Mapping[str, TrialRecord]) -> int:
    """Ends every RUNNING or WAITING trial of the sweep's studies; returns how many there were.

    A trial whose end stands in the ledger gets that end (the driver died between the two writes),
    any other is a FAIL.
    """
    closed = 0
    for summary in optuna.get_all_study_summaries(storage):
        if not re.fullmatch(rf"{re.escape(sweep)}-[0-9a-f]{{8}}", summary.study_name):
            continue
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING)):
            record = records.get(str(trial.user_attrs.get(KEY, "")))
            _close(storage, trial, record)
            closed += 1
    return closed


def copy_finished(
    study: optuna.Study, space: Space, records: Iterable[TrialRecord], *, metric: str
) -> int:
    """Adds finished trials that the space contains and the study lacks; returns how many."""
    present = {trial.user_attrs.get(KEY) for trial in study.get_trials(states=_ENDED)}
    added = 0
    for record in records:
        if record.key in present or not record.is_finished or not space.contains(record.point):
            continue
        study.add_trial(_frozen(space, record, metric=metric))
        added += 1
    return added


_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


def _close(storage: BaseStorage, trial: FrozenTrial, record: TrialRecord | None) -> None:
    # `Study.tell` refuses WAITING trials, and a trial id is what survives a restart.
    state = TrialState.FAIL
    values = None
    if record is not None and record.is_finished and trial.state == TrialState.RUNNING:
        state = _STATES[record.state]
        values = [record.value] if record.state == "complete" and record.value is not None else None
        storage.set_trial_user_attr(trial._trial_id, "reason", record.reason)
    if trial.state == TrialState.WAITING:
        storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    storage.set_trial_state_values(trial._trial_id, state, values)


def _frozen(space: Space, record: TrialRecord, *, metric: str) -> FrozenTrial:
    fixed = optuna.trial.FixedTrial(space.optuna_values(record.point), number=record.number)
    space.suggest(fixed)
    steps = {int(row["global_step"]): float(row[metric]) for row in record.history if metric in row}
    return optuna.trial.create_trial(
        state=_STATES[record.state],
        value=record.value if record.state == "complete" else None,
        params=fixed.params,
        distributions=fixed.distributions,
        user_attrs={KEY: record.key, "reason": record.reason, "cached": True},
        intermediate_values=steps,
    )
