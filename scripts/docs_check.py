"""Runs the shell blocks of Markdown files, in order, in one fresh folder per file.

Usage: python scripts/docs_check.py README.md docs/*.md

A block fenced as ```bash runs with `set -e`, from a copy of the tracked files, with this
environment's commands first on PATH. A block whose preceding line is `<!-- not run: reason -->`
is left out, and the reason is printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```bash\n(?P<code>.*?)^```$", re.M | re.S
)


def main() -> None:
    """Exits with 1 at the first block that fails."""
    ran = sum(check(Path(name)) for name in sys.argv[1:])
    print(f"{ran} passed, 0 failed")


def check(document: Path) -> int:
    """Runs one document's blocks; returns how many ran."""
    blocks = list(BLOCK.finditer(document.read_text(encoding="utf-8")))
    ran = 0
    with tempfile.TemporaryDirectory(prefix="docs-check-") as folder:
        if any(not block["reason"] for block in blocks):
            copy_tracked(Path(folder))
        for block in blocks:
            if block["reason"]:
                print(f"{document}: not run ({block['reason']})")
                continue
            run(document, block["code"], folder)
            ran += 1
    return ran


def copy_tracked(folder: Path) -> None:
    """The files of the working tree that git tracks, as a new user would have them."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    pack = ["tar", "--null", "--files-from=-", "--create", "--file=-"]
    archive = subprocess.run(pack, cwd=ROOT, input=names.stdout, capture_output=True, check=True)
    subprocess.run(["tar", "--extract", "--file=-"], cwd=folder, input=archive.stdout, check=True)


def run(document: Path, code: str, folder: str) -> None:
    """Runs one block, showing it and the time it took."""
    print(f"{document}:\n{code.rstrip()}", flush=True)
    commands = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "VENV": str(commands.parent),
    }
    start = time.perf_counter()
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment)
    print(f"→ exit {done.returncode} after {time.perf_counter() - start:.0f} s\n", flush=True)
    if done.returncode:
        sys.exit(1)


if __name__ == "__main__":
    main()
