"""Optuna's database storage, outlasting a locked file or a server that restarts.

Optuna gives up at the first failed commit. Its calls roll back when they fail, so each may be made
again; a trial that was created without our learning of it is closed with the session's zombies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import OperationalError

from forge_ray.sweep.patience import PAUSES_S, outlast

logger = logging.getLogger(__name__)

# What a study calls, through Optuna's cache or not; the underscored names are the cache's.
_CALLS = (
    "create_new_study",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_all_studies",
    "_create_new_trial",
    "_set_trial_param",
    "_get_trials",
    "set_trial_state_values",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial",
)


class PatientStorage(RDBStorage):
    """An `RDBStorage` whose calls outlast an outage of about a minute, with a line for each try."""

    pauses_s = PAUSES_S


def is_database_outage(error: BaseException) -> bool:
    """Whether the database may answer again: it is locked, or its server is away."""
    cause = error.__cause__
    return isinstance(cause, OperationalError) and "full" not in str(cause.orig)


def _patient(name: str) -> Callable[..., Any]:
    plain = getattr(RDBStorage, name)

    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return outlast(
            lambda: plain(self, *args, **kwargs),
            say=logger.warning,
            pauses_s=self.pauses_s,
            outage=is_database_outage,
            caught=StorageInternalError,
        )

    return cast(Callable[..., Any], call)


for _name in _CALLS:
    setattr(PatientStorage, _name, _patient(_name))
