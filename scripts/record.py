"""Runs a command that prints JSON and keeps the result with everything needed to repeat it.

Usage: python scripts/record.py NAME -- forge-ray … --json      writes docs/results/NAME.json

Paths on this machine are written relative to the repository.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("forge-ray", "ray", "deepspeed", "torch", "optuna", "faiss-cpu", "numpy")


def main() -> None:
    """Writes the record; fails when the command fails or prints no JSON."""
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    name, command = sys.argv[1], sys.argv[3:]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    record = {
        "command": " ".join(command),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "revision": revision(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {one: importlib.metadata.version(one) for one in PACKAGES},
        "result": json.loads(done.stdout.replace(f"{ROOT.parent}/", "../")),
    }
    target = ROOT / "docs" / "results" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}")


def revision() -> str:
    """The commit, marked when tracked files differ from it."""
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
