from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from torch import distributed

from tests.gr.workers import as_one_worker


# For the whole session: DeepSpeed keeps the first group that it sees, and fails with a second one.
@pytest.fixture(scope="session")
def _gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def process_group(_gloo: None) -> Iterator[None]:
    """This process is the only worker of a training."""
    with as_one_worker():
        yield


@pytest.fixture(autouse=True)
def _everything_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    """Commands run in this process quiet the handlers of Ray's loggers, pytest's among them."""
    caplog.handler.setLevel(logging.NOTSET)
