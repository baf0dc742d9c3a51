"""`forge-ray artifacts` and the failure line, as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter


def forge_ray(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from forge_ray.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def fill(store: ArtifactStore) -> str:
    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        with writer.open("file") as stream:
            stream.write(b"content")
        return ArtifactInfo(rows={"items": 1234})

    return store.build("things", "one", {"a": 1}, produce=produce).manifest.ref


def test_ls_show_rm(tmp_path: Path) -> None:
    ref = fill(ArtifactStore(tmp_path))
    listed = json.loads(forge_ray("artifacts", "ls", "--json", "--store", str(tmp_path)).stdout)
    assert [row["artifact"] for row in listed] == [ref]
    assert "1,234" in forge_ray("artifacts", "ls", "--store", str(tmp_path)).stdout
    shown = json.loads(forge_ray("artifacts", "show", ref, "--store", str(tmp_path)).stdout)
    assert shown["config"] == {"a": 1}
    assert forge_ray("artifacts", "rm", ref, "--store", str(tmp_path)).returncode == 0
    assert forge_ray("artifacts", "ls", "--json", "--store", str(tmp_path)).stdout.strip() == "[]"


def test_a_failure_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    done = forge_ray("artifacts", "show", "absent", "--store", str(tmp_path))
    assert done.returncode == 2
    assert "'absent' must name one artifact" in done.stderr
    assert "Traceback" not in done.stderr
