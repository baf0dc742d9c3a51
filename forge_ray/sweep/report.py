"""stub."""

from __future__ import annotations

from pathlib import Path

from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import SweepRecords


def write_report(
    path: Path, records: SweepRecords, config: SweepConfig, *, is_running: bool
) -> None:
    """Stub."""
    path.write_text("todo")
