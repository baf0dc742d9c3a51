"""What several service tests look at: one sweep that ran under everyone's eyes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.prometheus import program
from tests.services.watched import WatchedSweep, watched_sweep


@pytest.fixture(scope="session")
def watched() -> Iterator[WatchedSweep]:
    """A real sweep that has ended, on a Ray that is up, and a Prometheus that saw it run."""
    program("prometheus")
    with watched_sweep() as sweep:
        yield sweep
