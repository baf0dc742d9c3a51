"""A job's environment on a real head: pinned packages, and what a head says that cannot have it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.faults import TinySweep
from tests.e2e.head import TokenHead
from tests.e2e.test_jobs import answer

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]

NAME, VERSION = "forge_probe", "1.0"
NOTE = """
import os, pathlib
folder = os.environ.get("FORGE_PROBE_FOLDER")
if folder:
    said = pathlib.Path("/proc/self/cmdline").read_bytes()
    pathlib.Path(folder, str(os.getpid())).write_bytes(said)
"""


def make_wheel(folder: Path) -> None:
    """A package of which every interpreter that has it leaves a note as it starts."""
    info = f"{NAME}-{VERSION}.dist-info"
    files = {
        f"{NAME}.py": NOTE,
        f"{NAME}.pth": f"import {NAME}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{NAME}-{VERSION}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenHead]:
    """A head whose pip knows one folder and nothing else."""
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder)
    with pytest.MonkeyPatch.context() as patch:
        # Each try may copy a whole environment.
        patch.setenv("RUNTIME_ENV_RETRY_TIMES", "1")
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder))
        started = TokenHead.start()
    yield started
    started.stop()


def test_pinned_packages_are_there_for_the_driver_and_its_workers(
    head: TokenHead, tmp_path: Path
) -> None:
    sweep = TinySweep.make(tmp_path / "project")
    notes = tmp_path / "notes"
    notes.mkdir()
    (sweep.folder / "packages.txt").write_text(f"{NAME}=={VERSION}\n")
    submit = ["submit", "sweep.yaml", "points=[]", "gr.max_steps=20", "num_trials=1"]
    submit += ["sampler.kind=quasi_random", "--store", str(sweep.folder / "store")]
    submit += ["--driver-cpus", "0.5", "--pip", "packages.txt"]
    answer(head, sweep.folder, *submit, "--env", f"FORGE_PROBE_FOLDER={notes}", "--wait")
    assert [one.state for one in sweep.ledger.read().trials.values()] == ["complete"]
    commands = [one.read_text() for one in notes.iterdir()]
    assert any("forge_ray\0sweep\0run" in one for one in commands)
    assert any("default_worker.py" in one for one in commands)


def test_packages_that_cannot_be_had_are_told(head: TokenHead, tmp_path: Path) -> None:
    sweep = TinySweep.make(tmp_path / "project")
    (sweep.folder / "packages.txt").write_text(f"{NAME}==2.0\n")
    store = ["--store", str(sweep.folder / "store")]
    submit = ["submit", "sweep.yaml", *store, "--pip", "packages.txt", "--wait"]
    _, err = answer(head, sweep.folder, *submit, code=1)
    assert "--pip must name packages that every node can install, got No matching" in err, err
    assert f"{NAME}==2.0" in err


def test_an_image_that_the_nodes_cannot_run_is_told(head: TokenHead, tmp_path: Path) -> None:
    sweep = TinySweep.make(tmp_path / "project")
    store = ["--store", str(sweep.folder / "store")]
    submit = ["submit", "sweep.yaml", *store, "--image", "registry.invalid/forge-ray:1"]
    _, err = answer(head, sweep.folder, *submit, "--wait", code=1)
    assert "--image must run on every node, with podman, got " in err, err
    found = json.loads(answer(head, sweep.folder, "status", "tiny", "--json")[0])
    assert found["status"] == "FAILED"
    assert found["reason"] in err
