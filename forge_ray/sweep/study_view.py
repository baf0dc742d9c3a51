"""The studies of several sweeps as one Optuna storage that only reads, for the dashboard.

optuna-dashboard shows one storage and knows neither sweeps nor spaces: here each sweep's studies
come together under readable names, other people's studies in a shared database stay out, and
nothing that a browser sends can change what a sweep learns from.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from forge_ray.errors import ConfigError

logger = logging.getLogger(__name__)

_METRIC_NAMES = "study:metric_names"


@dataclass(frozen=True, kw_only=True)
class StudySource:
    """Where the studies of one sweep are.

    Attributes:
        sweep: Name of the sweep.
        metrics: Names of the objectives, in order.
        current: Name of the study of the current space.
        url: Storage as in the sweep file, empty for the SQLite file in `folder`.
        folder: The sweep's folder.
    """

    sweep: str
    metrics: tuple[str, ...]
    current: str
    url: str
    folder: Path

    def open(self) -> BaseStorage | None:
        """The storage, creating nothing; None while the sweep has none."""
        url = self.url or f"sqlite:///{self.folder / 'optuna.db'}"
        if url.endswith(".journal"):
            return JournalStorage(JournalFileBackend(url)) if Path(url).exists() else None
        options: dict[str, Any] = {}
        if url.startswith("sqlite"):
            path = Path(str(make_url(url).database)).resolve()
            if not path.exists():
                return None
            # `rw` and not `ro`: what a killed driver left half-written can then be rolled back.
            url = f"sqlite:///file:{quote(str(path))}?mode=rw&uri=true"
            options = {"connect_args": {"timeout": 60}}
        try:
            return RDBStorage(
                url, engine_kwargs=options, skip_compatibility_check=True, skip_table_creation=True
            )
        except ImportError as error:
            raise ConfigError(
                f"storage of sweep {self.sweep!r} must have its database driver, got none: {error}."
            ) from error


class StudyView(BaseStorage):
    """See the module docstring; a study's number here is its own number and its sweep's, mixed.

    Args:
        sources: One per sweep.
    """

    def __init__(self, sources: Sequence[StudySource]) -> None:
        self._sources = list(sources)
        self._storages: dict[int, BaseStorage] = {}
        self._lock = threading.Lock()

    def get_all_studies(self) -> list[FrozenStudy]:
        """The studies of all sweeps; a storage that cannot be reached is left out."""
        return [one for place in range(len(self._sources)) for one in self.studies_of(place)]

    def studies_of(self, place: int) -> list[FrozenStudy]:
        """The studies of one sweep; none where its storage cannot be reached.

        Args:
            place: Of its source.
        """
        source = self._sources[place]
        try:
            return self._read(place, source)
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, OSError) as error:
            logger.warning("sweep %s: its studies cannot be read: %s", source.sweep, error)
            return []

    def _read(self, place: int, source: StudySource) -> list[FrozenStudy]:
        storage = self._storage(place)
        return [
            FrozenStudy(
                study_name=self._shown(source, study.study_name),
                direction=None,
                directions=study.directions,
                user_attrs=study.user_attrs,
                system_attrs=_named(study.system_attrs, source.metrics, study.directions),
                study_id=self._out(study._study_id, place),
            )
            for study in (storage.get_all_studies() if storage else [])
            if re.fullmatch(rf"{re.escape(source.sweep)}-[0-9a-f]{{8}}", study.study_name)
        ]

    def _storage(self, place: int) -> BaseStorage | None:
        with self._lock:
            if place not in self._storages:
                storage = self._sources[place].open()
                if storage is None:
                    return None
                self._storages[place] = storage
            return self._storages[place]

    def _shown(self, source: StudySource, name: str) -> str:
        same = [one for one in self._sources if one.sweep == source.sweep]
        sweep = source.sweep if len(same) == 1 else f"{source.sweep} in {source.folder}"
        return sweep if name == source.current else f"{sweep} (earlier space {name[-8:]})"

    def _out(self, number: int, place: int) -> int:
        return number * len(self._sources) + place

    def _in(self, number: int) -> tuple[BaseStorage, int, int]:
        inner, place = divmod(number, len(self._sources))
        storage = self._storage(place)
        if storage is None:
            raise KeyError(number)
        return storage, inner, place

    def get_study_id_from_name(self, study_name: str) -> int:
        """Number of a study by its shown name."""
        return {one.study_name: one._study_id for one in self.get_all_studies()}[study_name]

    def get_study_name_from_id(self, study_id: int) -> str:
        """Shown name of a study."""
        return {one._study_id: one.study_name for one in self.get_all_studies()}[study_id]

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """As in the study."""
        storage, inner, _ = self._in(study_id)
        return storage.get_study_directions(inner)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """As in the study."""
        storage, inner, _ = self._in(study_id)
        return storage.get_study_user_attrs(inner)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """As in the study, with the names of the objectives."""
        storage, inner, place = self._in(study_id)
        attributes = storage.get_study_system_attrs(inner)
        directions = storage.get_study_directions(inner)
        return _named(attributes, self._sources[place].metrics, directions)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """One trial."""
        storage, inner, place = self._in(trial_id)
        return self._trial(storage.get_trial(inner), place)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """All trials of a study."""
        storage, inner, place = self._in(study_id)
        trials = storage.get_all_trials(inner, deepcopy=deepcopy, states=states)
        return [self._trial(one, place) for one in trials]

    def _trial(self, trial: FrozenTrial, place: int) -> FrozenTrial:
        # A shallow copy: the storage may keep the original.
        shown = copy.copy(trial)
        shown._trial_id = self._out(trial._trial_id, place)
        return shown

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise PermissionError("the dashboard only reads; `forge-ray sweep run` owns its studies")

    create_new_study = _refuse
    delete_study = _refuse
    set_study_user_attr = _refuse
    set_study_system_attr = _refuse
    create_new_trial = _refuse
    set_trial_param = _refuse
    set_trial_state_values = _refuse
    set_trial_intermediate_value = _refuse
    set_trial_user_attr = _refuse
    set_trial_system_attr = _refuse


def _named(
    attributes: dict[str, Any], metrics: tuple[str, ...], directions: Sequence[StudyDirection]
) -> dict[str, Any]:
    if len(metrics) != len(directions):
        return attributes
    return {**attributes, _METRIC_NAMES: list(metrics)}
