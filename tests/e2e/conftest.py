from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.faults import end_drivers


@pytest.fixture(autouse=True)
def _no_driver_stays() -> Iterator[None]:
    yield
    end_drivers()
