from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from forge_ray.errors import ConfigError
from forge_ray.secrets import masked_url
from forge_ray.sweep import study
from forge_ray.sweep.study import open_storage
from tests.sweep.storage_contract import StorageContract


class TestSqlite(StorageContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'shared.db'}"


class TestJournal(StorageContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "shared.journal")


def test_a_missing_driver_is_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'forge-ray\[postgres\]'") as caught:
        open_storage("postgresql://user:secret@host/db", tmp_path)
    assert "secret" not in str(caught.value)


def test_a_database_that_is_not_there_is_named_without_its_password(
    monkeypatch, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setattr(study, "_PAUSE_S", 0.0)
    with pytest.raises(ConfigError, match=r"user:\*\*\*@127.0.0.1:1/db must be") as caught:
        open_storage("postgresql://user:secret@127.0.0.1:1/db", tmp_path)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p:w/x@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("postgresql://u@h:5432/db", "postgresql://u@h:5432/db"),
        ("postgresql://h/db?user=u&password=pw&x=1", "postgresql://h/db?user=u&password=***&x=1"),
        ("u:pw@h/db", "u:***@h/db"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_passwords_are_masked(url: str, shown: str) -> None:
    assert masked_url(url) == shown
