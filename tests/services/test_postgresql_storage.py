"""Sweeps on a real PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from forge_ray.errors import ConfigError
from forge_ray.sweep.study import close_unfinished, open_storage
from tests.services.postgresql import PASSWORD, USER, Cluster, running
from tests.sweep.storage_contract import StorageContract, finish, make

pytestmark = pytest.mark.services

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("psycopg", reason="pip install 'forge-ray[postgres]'")
    with running() as server:
        yield server


@pytest.fixture
def url(cluster: Cluster) -> str:
    database = f"optuna{next(_NUMBERS)}"
    cluster.create(database)
    return f"postgresql://{USER}:{quote(PASSWORD)}@127.0.0.1:{cluster.port}/{database}"


class TestPostgresql(StorageContract):
    """The contract on PostgreSQL."""


def test_a_wrong_password_is_refused_and_shown_nowhere(url: str, tmp_path: Path) -> None:
    wrong = url.replace(quote(PASSWORD), "mistaken")
    with pytest.raises(ConfigError, match="password authentication failed") as caught:
        open_storage(wrong, tmp_path)
    assert "mistaken" not in str(caught.value)


def test_a_restarted_server_ends_no_sweep(cluster: Cluster, url: str, tmp_path: Path) -> None:
    search = make("s", url, tmp_path)
    search.suggest("t0")
    cluster.stop()
    cluster.start()
    finish(search, 0, value=0.5)
    search.suggest("t1")
    finish(search, 1, value=0.25)
    assert [one.value for one in search.study.get_trials()] == [0.5, 0.25]
    assert close_unfinished(open_storage(url, tmp_path), "s", {}) == 0
