"""Fixtures that every test may use: one local Ray, real data, an artifact store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from forge_ray.artifacts import ArtifactStore

# Before torch or Ray start in this process: no CUDA probing, no usage report, quiet workers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tables are as wide as in a pipe, whatever terminal this is.
os.environ.pop("COLUMNS", None)

# A deadline per example measures how busy the machine is.
settings.register_profile("forge-ray", deadline=None)
settings.load_profile("forge-ray")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of two CPUs, shared by the whole run; tests never start their own."""
    from forge_ray.launch.connect import connect, disconnect

    connect(address="local", num_cpus=2, dashboard=False)
    yield
    disconnect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets; a test that needs it is skipped where it is absent."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("FORGE_RAY_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set FORGE_RAY_DATA to its folder")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """An empty artifact store."""
    return ArtifactStore(tmp_path / "store")
