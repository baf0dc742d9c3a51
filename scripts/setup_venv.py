"""Creates or refreshes the virtual environment with forge-ray and its pinned dependencies.

Usage: python scripts/setup_venv.py [.venv]      (standard library only; Python >= 3.10)

Where the given Python already has a CUDA build of torch, the environment sees that one and the CPU
pin of constraints.txt does not apply; otherwise torch comes from the pins.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBE = "import torch; print(torch.__version__ if torch.version.cuda else '')"


def main() -> None:
    """Installs unless the environment already matches pyproject.toml and constraints.txt."""
    if sys.version_info < (3, 10):  # noqa: UP036 (the user's Python runs this file)
        found = sys.version.split()[0]
        sys.exit(f"python must be >= 3.10, got {found}. Run `make PYTHON=python3.11`.")
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv").resolve()
    stamp = target / ".forge-ray-installed"
    wanted = fingerprint()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    cuda_torch = installed_cuda_torch()
    create(target, sees_system=bool(cuda_torch))
    install(target / "bin" / "python", cuda_torch)
    stamp.write_text(wanted)


def fingerprint() -> str:
    """Changes when the environment has to be installed again."""
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"".join([*parts, sys.version.encode()])).hexdigest()


def installed_cuda_torch() -> str:
    """Version of the CUDA torch that this Python imports, or an empty string."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def create(target: Path, *, sees_system: bool) -> None:
    """Makes the environment, naming the package that a bare Debian lacks."""
    try:
        venv.create(target, with_pip=True, system_site_packages=sees_system, clear=True)
    except (subprocess.CalledProcessError, ImportError):
        sys.exit("python must bring venv and pip, got neither. Run `apt-get install python3-venv`.")


def install(python: Path, cuda_torch: str) -> None:
    """Installs the pinned dependencies, then this package in place."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    if cuda_torch:
        lines = [line for line in lines if not line.startswith("torch==")]
        lines.append(f"torch=={cuda_torch}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write("\n".join(lines) + "\n")
        pins.flush()
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch first: later packages then find it and resolve nothing newer.
        for what in (["--upgrade", "pip"], ["torch"], ["--editable", f"{ROOT}[dev]"]):
            subprocess.run([*pip, "--constraint", pins.name, *what], check=True)


if __name__ == "__main__":
    main()
