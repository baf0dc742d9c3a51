"""Opening what a command is given: a prepared dataset or a folder of raw files."""

from __future__ import annotations

from pathlib import Path

from forge_ray.artifacts import MANIFEST, ArtifactStore
from forge_ray.cli.console import working
from forge_ray.data.prepare import open_or_prepare
from forge_ray.data.schema import Dataset
from forge_ray.launch.connect import connected


def open_data(ref: str, store: ArtifactStore, *, verbose: bool) -> Dataset:
    """A dataset by reference or directory, or a folder of raw files, which is prepared.

    Ray starts only for raw files.
    """
    is_raw = Path(ref).is_dir() and not Path(ref, MANIFEST).exists()
    if not is_raw and "://" not in ref:
        return Dataset.open(store, ref)
    with connected(verbose=verbose), working(f"preparing {ref}"):
        return open_or_prepare(ref, store)
