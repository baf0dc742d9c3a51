from __future__ import annotations

import sqlite3
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from forge_ray.sweep import patient_storage
from forge_ray.sweep.patient_storage import PatientStorage


def opened(path: Path, pauses_s: tuple[float, ...]) -> PatientStorage:
    options = {"connect_args": {"timeout": 0.05}}
    storage = PatientStorage(f"sqlite:///{path}", engine_kwargs=options)
    storage.pauses_s = pauses_s
    return storage


def lock(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_a_locked_database_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "optuna.db"
    study = optuna.create_study(storage=opened(path, (0.01,) * 5))
    holder = lock(path)
    said: list[str] = []

    def free_at_second(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            holder.rollback()

    monkeypatch.setattr(patient_storage.logger, "warning", free_at_second)
    trial = study.ask()
    trial.suggest_int("x", 0, 9)
    study.tell(trial, 1.0)
    assert [one.state for one in study.trials] == [TrialState.COMPLETE]
    assert len(said) == 2
    assert "storage does not answer" in said[0]
    assert "database is locked" in said[0]


def test_one_that_stays_locked_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "optuna.db"
    study = optuna.create_study(storage=opened(path, (0.01,)))
    holder = lock(path)
    with pytest.raises(StorageInternalError):
        study.ask()
    holder.rollback()
    holder.close()
    assert study.ask().number == 0
