"""What a sweep ran on, kept with it: versions, the code's revision, what the cluster offers.

Known for the latest session. Nothing here decides anything; reports show it.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray

import forge_ray

_LIBRARIES = ("ray", "torch", "optuna", "deepspeed")
_RESOURCES = ("CPU", "GPU", "memory")


def describe_environment() -> dict[str, Any]:
    """Versions, revision and cluster resources as plain data; a Ray that is up is asked."""
    return {
        "forge-ray": forge_ray.__version__,
        "revision": _revision(Path(forge_ray.__file__).parent),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "cluster": _cluster() if ray.is_initialized() else {},
    }


def _cluster() -> dict[str, float]:
    found: Mapping[str, float] = ray.cluster_resources()
    nodes = [one for one in ray.nodes() if one["Alive"]]
    offered = {name: found[name] for name in _RESOURCES if name in found}
    return {"nodes": len(nodes), **offered}


def _revision(folder: Path) -> str:
    """Commit that the package was imported from; empty where git does not track it."""
    git = shutil.which("git")
    # Tracked, or an installed package would take the revision of whatever repository holds it.
    if git is None or not _git(git, folder, "ls-files", "__init__.py"):
        return ""
    return _git(git, folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(git: str, folder: Path, *words: str) -> str:
    done = subprocess.run([git, *words], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
