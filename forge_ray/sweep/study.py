"""The Optuna side of a sweep's memory: its storage, its study, and what a killed driver left there.

A study belongs to one definition of the space, because Optuna refuses a parameter whose choices
change; the finished trials that the new space contains are copied into the new study.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from forge_ray.config import canonical_json
from forge_ray.errors import ConfigError
from forge_ray.secrets import masked_url
from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.objectives import objective_values
from forge_ray.sweep.patient_storage import PatientStorage
from forge_ray.sweep.prices import Prices, trial_cost
from forge_ray.sweep.space import Point, Space

KEY = "trial_key"
"""Optuna user attribute that holds the trial key."""

OWNER = "sweep"
"""Optuna user attribute of a study that tells whose it is; see `Owner`."""

_PAUSE_S = 1.0
POPULATION = 16
"""Trials of a generation of `nsga2`: Optuna's 50 would be the whole of most sweeps."""

_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Whose a study is: two stores may each hold a sweep of one name.

    Attributes:
        id: `SweepRecords.id`; it decides, and stays where a folder is moved.
        folder: The sweep's folder, for people.
        host: The machine of its driver, for people.
    """

    id: str
    folder: str
    host: str


def open_storage(url: str, folder: Path) -> BaseStorage:
    """The storage that a sweep file names; empty keeps a SQLite file in `folder`.

    Raises:
        ConfigError: It is no such name, its driver is missing, or the database cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url.endswith(".journal"):
        return JournalStorage(JournalFileBackend(url))
    if not url:
        folder.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{folder / 'optuna.db'}"
    if "://" not in url:
        raise ConfigError(
            f"storage must be a database URL or a .journal path, got {masked_url(url)!r}. "
            "Write sqlite:///path/optuna.db."
        )
    if url.startswith(("postgresql://", "postgres://")):
        url = _with_driver(url)
    # SQLite waits for a reader (a dashboard) before it says that it is locked; a server may have
    # been restarted since a connection was used last.
    is_file = url.startswith("sqlite")
    return _connect(url, {"connect_args": {"timeout": 60}} if is_file else {"pool_pre_ping": True})


def _with_driver(url: str) -> str:
    # Which driver a bare `postgresql:` means depends on the release of SQLAlchemy.
    if importlib.util.find_spec("psycopg") is None:
        raise ConfigError(
            f"storage {masked_url(url)} must have its driver psycopg, got none. "
            "Run pip install 'forge-ray[postgres]'."
        )
    return f"postgresql+psycopg://{url.partition('://')[2]}"


def _connect(url: str, options: dict[str, Any], tries: int = 4) -> PatientStorage:
    try:
        return PatientStorage(url, engine_kwargs=options)
    except SQLAlchemyError as error:
        if tries == 1:
            reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
            raise ConfigError(
                f"storage {masked_url(url)} must be a database that can be used, got: {reason}. "
                "Start it, or correct the URL."
            ) from None
    # Drivers that start together both create the tables, and one of them fails: it tries again.
    time.sleep(_PAUSE_S)
    return _connect(url, options, tries - 1)


def study_name(sweep: str, definition: Mapping[str, Any], objectives: Sequence[str] = ()) -> str:
    """Name of the study for one definition of the space, and of the aims where there are several.

    Optuna fixes the number of objectives of a study.
    """
    meaning = {"space": dict(definition), "objectives": list(objectives)}
    content = canonical_json(meaning if len(objectives) > 1 else dict(definition))
    digest = hashlib.sha256(content.encode()).hexdigest()
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


def proxy_attributes(proxies: Mapping[str, Any]) -> dict[str, float]:
    """Proxies as Optuna user attributes: `proxy:backoff_bits` and so on, numbers only."""
    return {
        f"proxy:{name}": float(value)
        for name, value in proxies.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def close_unfinished(storage: BaseStorage, sweep: str, records: Mapping[str, TrialRecord]) -> int:
    """Ends every RUNNING or WAITING trial of the sweep's studies; returns how many there were.

    A trial whose end stands in the ledger gets that end (the driver died between the two writes),
    any other is a FAIL.
    """
    closed = 0
    for study in _studies(storage, sweep):
        for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING)):
            record = records.get(str(trial.user_attrs.get(KEY, "")))
            _close(storage, trial, record, num_objectives=len(study.directions))
            closed += 1
    return closed


def check_owner(storage: BaseStorage, sweep: str, owner: Owner) -> None:
    """Refuses a storage that holds studies of another sweep of the same name.

    Raises:
        ConfigError: See above. Each would close the other's running trials as failed.
    """
    for study in _studies(storage, sweep):
        other = study.user_attrs.get(OWNER)
        if other is not None and other["id"] != owner.id:
            raise ConfigError(
                f"name must be the only {sweep!r} of its storage, got one that runs from "
                f"{other['folder']} on {other['host']} beside this one, {owner.folder}. Set "
                "another name; if that sweep is gone for good, delete its study "
                f"{study.study_name}."
            )


def adopt_studies(storage: BaseStorage, sweep: str, owner: Owner) -> None:
    """Notes the owner on the sweep's studies that tell none: new ones, and of earlier versions."""
    for study in _studies(storage, sweep):
        if OWNER not in study.user_attrs:
            study.set_user_attr(OWNER, asdict(owner))


def _studies(storage: BaseStorage, sweep: str) -> list[optuna.Study]:
    # Not merely a prefix: a storage may hold the sweeps `a` and `a-b`.
    return [
        optuna.load_study(study_name=name, storage=storage)
        for name in optuna.get_all_study_names(storage)
        if re.fullmatch(rf"{re.escape(sweep)}-[0-9a-f]{{8}}", name)
    ]


def begin_trial(
    study: optuna.Study, space: Space, point: Point, attributes: Mapping[str, Any]
) -> Trial:
    """Begins a trial whose point is decided, in one commit: each costs the disk a few milliseconds.

    Args:
        study: Gets the trial, running.
        space: A point outside of it has no parameters that a sampler could learn from.
        point: What the trial is.
        attributes: User attributes.
    """
    params, distributions = _optuna_params(space, point) if space.contains(point) else ({}, {})
    begun = optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params=params,
        distributions=distributions,
        user_attrs=dict(attributes),
    )
    storage = study._storage  # Optuna's cache, which `Trial` reads
    study_id = storage.get_study_id_from_name(study.study_name)
    return Trial(study, storage.create_new_trial(study_id, template_trial=begun))


def copy_finished(
    study: optuna.Study,
    space: Space,
    records: Iterable[TrialRecord],
    *,
    objectives: Sequence[str],
    prices: Prices,
) -> int:
    """Adds finished trials that the space contains and the study lacks; returns how many.

    A study of several objectives takes complete trials that have them all.
    """
    present = {trial.user_attrs.get(KEY) for trial in study.get_trials(states=_ENDED)}
    added = 0
    for record in records:
        if record.key in present or not record.is_finished or not space.contains(record.point):
            continue
        values = optuna_objectives(record, objectives, prices)
        if values is None and (record.state == "complete" or len(objectives) > 1):
            continue
        present.add(record.key)
        cost = round(trial_cost(record, prices), 6)
        study.add_trial(_frozen(space, record, values, metric=objectives[0], cost_usd=cost))
        added += 1
    return added


def optuna_objectives(
    record: TrialRecord, objectives: Sequence[str], prices: Prices
) -> list[float] | None:
    """What Optuna is told of a complete trial; None for others and where an objective lacks."""
    if len(objectives) == 1:
        is_told = record.state == "complete" and record.value is not None
        return [float(record.value or 0.0)] if is_told else None
    values = objective_values(record, objectives, prices)
    return None if values is None else list(values.values())


_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


def _close(
    storage: BaseStorage, trial: FrozenTrial, record: TrialRecord | None, *, num_objectives: int
) -> None:
    # `Study.tell` refuses WAITING trials, and a trial id is what survives a restart.
    state, values = TrialState.FAIL, None
    if record is not None and record.is_finished and trial.state == TrialState.RUNNING:
        state, values = _end(record, num_objectives)
        storage.set_trial_user_attr(trial._trial_id, "reason", record.reason)
    if trial.state == TrialState.WAITING:
        storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    storage.set_trial_state_values(trial._trial_id, state, values)


def _end(record: TrialRecord, num_objectives: int) -> tuple[TrialState, list[float] | None]:
    if num_objectives == 1:
        values = [record.value] if record.state == "complete" and record.value is not None else None
        return _STATES[record.state], values
    # Optuna prunes under one objective only.
    values = list(record.objectives.values())
    is_whole = record.state == "complete" and len(values) == num_objectives
    return (TrialState.COMPLETE, values) if is_whole else (TrialState.FAIL, None)


def _frozen(
    space: Space,
    record: TrialRecord,
    values: Sequence[float] | None,
    *,
    metric: str,
    cost_usd: float,
) -> FrozenTrial:
    params, distributions = _optuna_params(space, record.point)
    # A row whose metric was no number stands in the ledger as null.
    steps = {
        int(row["global_step"]): float(row[metric])
        for row in record.history
        if row.get(metric) is not None
    }
    return optuna.trial.create_trial(
        state=_STATES[record.state],
        values=values,
        params=params,
        distributions=distributions,
        user_attrs={
            KEY: record.key,
            "number": record.number,
            "reason": record.reason,
            "cached": True,
            "cost_usd": cost_usd,
            **proxy_attributes(record.proxies),
        },
        intermediate_values=steps,
    )


def _optuna_params(
    space: Space, point: Point
) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    fixed = optuna.trial.FixedTrial(space.optuna_values(point))
    space.suggest(fixed)
    return fixed.params, fixed.distributions
