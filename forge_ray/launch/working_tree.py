"""The folder that a job runs in: which files of it travel, how large they are, and their archive.

Knows ignore files, links and sizes. Knows neither Ray nor sweeps.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from forge_ray.errors import ConfigError

MIB = 2**20
MAX_BYTES = 100 * MIB
"""Largest tree that is sent: the head keeps its archive in memory and every node unpacks it."""
IGNORE_FILES = (".gitignore", ".rayignore")
ALWAYS_LEFT_OUT = (
    *(".git/", ".hg/", ".venv/", "venv/", "node_modules/", "__pycache__/", "*.pyc", "*.egg-info/"),
    *(".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".hypothesis/", ".ipynb_checkpoints/"),
    *("/forge-store/", "/forge-runs/", "/recommendations/"),
    # What holds passwords: whoever may read jobs may read their files.
    *(".env", ".env.*", ".netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519"),
    *(".ssh/", ".gnupg/", ".aws/", ".azure/", ".kube/", ".docker/", ".ray/", "**/.config/gcloud/"),
    "application_default_credentials.json",
)
_NAMED = 5
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class WorkingTree:
    """Files that travel.

    Attributes:
        root: The folder, resolved.
        sizes: Bytes of each file by its path from the root, in order of the paths.
    """

    root: Path
    sizes: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return sum(self.sizes.values())

    def holds(self, path: str) -> bool:
        """Whether a file, or something below a folder, travels; `path` is relative to the root."""
        name = Path(path).as_posix()
        return name == "." or any(one == name or one.startswith(f"{name}/") for one in self.sizes)


def read_tree(root: Path, *, exclude: Sequence[str] = ()) -> WorkingTree:
    """Lists what travels: all but `ALWAYS_LEFT_OUT`, what ignore files name, and `exclude`.

    Args:
        root: The folder.
        exclude: More patterns, spelled as in `.gitignore`.

    Raises:
        ConfigError: A link leads out of the folder or in a circle, or the files are more than
            `MAX_BYTES`.
    """
    root = root.resolve()
    files = _walk(root, root, _Rules(root, exclude), (root,))
    tree = WorkingTree(root=root, sizes=dict(sorted(files)))
    _check_size(tree)
    return tree


def write_archive(tree: WorkingTree, path: Path) -> str:
    """Writes the tree as a zip file, byte for byte the same for the same files.

    Returns:
        SHA-256 of the archive, in hex: the tree's identity.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in tree.sizes:
            source = tree.root / name
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            is_program = os.access(source, os.X_OK)
            entry.external_attr = (0o100755 if is_program else 0o100644) << 16
            archive.writestr(entry, source.read_bytes())
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Rules:
    """What stays here: `ALWAYS_LEFT_OUT`, and ignore files as git reads them.

    Those count that lie between a path and the top of its repository; the nearest has the last
    word.
    """

    def __init__(self, root: Path, exclude: Sequence[str]) -> None:
        self._root = root
        self._own = GitIgnoreSpec.from_lines([*ALWAYS_LEFT_OUT, *exclude])
        self._top = next((x for x in (root, *root.parents) if (x / ".git").exists()), root)
        self._read: dict[Path, list[tuple[Path, GitIgnoreSpec]]] = {}

    def leave_out(self, path: Path, *, is_folder: bool) -> bool:
        """Whether a path stays here whose folder travels."""
        end = "/" if is_folder else ""
        if self._own.match_file(path.relative_to(self._root).as_posix() + end):
            return True
        for base, spec in reversed(self._specs(path.parent)):
            verdict = spec.check_file(path.relative_to(base).as_posix() + end).include
            if verdict is not None:
                return verdict
        return False

    def leave_out_below(self, path: Path, *, is_folder: bool) -> bool:
        """Whether a path stays here, by itself or with a folder around it."""
        if path == self._root:
            return False
        return self.leave_out(path, is_folder=is_folder) or self.leave_out_below(
            path.parent, is_folder=True
        )

    def _specs(self, folder: Path) -> list[tuple[Path, GitIgnoreSpec]]:
        if folder not in self._read:
            above = [] if folder == self._top else self._specs(folder.parent)
            files = [folder / name for name in IGNORE_FILES if (folder / name).is_file()]
            texts = [one.read_text(encoding="utf-8").splitlines() for one in files]
            own = [(folder, GitIgnoreSpec.from_lines(lines)) for lines in texts]
            self._read[folder] = [*above, *own]
        return self._read[folder]


def _walk(
    folder: Path, root: Path, rules: _Rules, around: tuple[Path, ...]
) -> Iterator[tuple[str, int]]:
    """Files below a folder; `around` are the real folders of the way there, its own the last."""
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if entry.is_symlink() and not path.exists():
            continue  # one that leads nowhere does not travel
        is_folder = entry.is_dir()
        if rules.leave_out(path, is_folder=is_folder):
            continue
        real = path.resolve() if entry.is_symlink() else around[-1] / entry.name
        _check_inside(path, real, root)
        # What stays here stays here under another name too.
        if real != path and rules.leave_out_below(real, is_folder=is_folder):
            continue
        if is_folder:
            if entry.is_symlink():
                _check_circle(path, real, root, around)
            yield from _walk(path, root, rules, (*around, real))
        elif entry.is_file():
            yield path.relative_to(root).as_posix(), entry.stat().st_size


def _check_inside(path: Path, real: Path, root: Path) -> None:
    if not real.is_relative_to(root):
        raise ConfigError(
            f"{path.relative_to(root)} must stay inside {root} to be sent, got a link to {real}. "
            "Copy the file, or leave it out with --exclude."
        )


def _check_circle(path: Path, real: Path, root: Path, around: tuple[Path, ...]) -> None:
    if any(one.is_relative_to(real) for one in around):
        raise ConfigError(
            f"{path.relative_to(root)} must not lead to a folder around it, got {real}. Leave it "
            "out with --exclude."
        )


def _check_size(tree: WorkingTree) -> None:
    if tree.num_bytes <= MAX_BYTES:
        return
    largest = sorted(tree.sizes.items(), key=lambda one: -one[1])[:_NAMED]
    named = ", ".join(f"{name} ({size / MIB:.1f} MiB)" for name, size in largest)
    raise ConfigError(
        f"{tree.root} must have at most {MAX_BYTES // MIB} MiB of files to be sent, got "
        f"{tree.num_bytes / MIB:.1f} MiB in {len(tree.sizes)}, the largest: {named}. Name what a "
        "sweep does not need in .gitignore or --exclude, and put data into the store."
    )
