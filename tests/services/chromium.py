"""Opening a file in a real browser, without a network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--virtual-time-budget=8000",
    # Nothing may be fetched: the file is all there is.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def find_browser() -> str:
    """Path of Chromium; the test is skipped where there is none."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("chromium not found; install it (apt-get install chromium)")
    return found


def rendered(page: Path, profile: Path, *flags: str) -> str:
    """The document after its scripts ran, as HTML."""
    command = [find_browser(), *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout
