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


HERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
"""What this machine serves is all that can be reached."""
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
"""Where pictures of pages are kept, for whoever runs the tests."""


def dom(url: str, profile: Path, *flags: str) -> str:
    """A page that this machine serves, after its scripts ran, as HTML."""
    done = subprocess.run(
        [*_served(profile), *flags, "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


def screenshot(url: str, profile: Path, name: str) -> Path:
    """A picture of such a page, below `SCREENSHOTS`."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    command = [*_served(profile), f"--screenshot={path}", "--window-size=1400,1400", url]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    return path


def _served(profile: Path) -> list[str]:
    flags = [one for one in FLAGS if "resolver" not in one]
    return [find_browser(), *flags, HERE, f"--user-data-dir={profile}"]
