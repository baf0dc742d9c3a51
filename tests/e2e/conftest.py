from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.faults import TinySweep, end_drivers


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TinySweep:
    """The tiny sweep that nothing happened to."""
    sweep = TinySweep.make(tmp_path_factory.mktemp("undisturbed"))
    sweep.finish(sweep.start())
    return sweep


@pytest.fixture(autouse=True)
def _no_driver_stays() -> Iterator[None]:
    yield
    end_drivers()
