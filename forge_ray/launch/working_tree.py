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
    *(".env", ".env.*", ".netrc", ".pgpass", "*.pem", "id_rsa", "id_ed25519", ".aws/", ".kube/"),
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
        ConfigError: A link leads out of the folder, or the files are more than `MAX_BYTES`.
    """
    root = root.resolve()
    own = GitIgnoreSpec.from_lines([*ALWAYS_LEFT_OUT, *exclude])
    files = _walk(root, root, [], own)
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


_Specs = list[tuple[Path, GitIgnoreSpec]]


def _walk(root: Path, folder: Path, specs: _Specs, own: GitIgnoreSpec) -> Iterator[tuple[str, int]]:
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
            specs = [*specs, (folder, GitIgnoreSpec.from_lines(lines))]
    for entry in os.scandir(folder):
        path = Path(entry.path)
        is_folder = entry.is_dir()
        if _is_ignored(path, root, specs, own, is_folder=is_folder):
            continue
        if entry.is_symlink() and path.exists():  # one that leads nowhere does not travel
            _check_link(path, root)
        if is_folder:
            yield from _walk(root, path, specs, own)
        elif entry.is_file():
            yield path.relative_to(root).as_posix(), entry.stat().st_size


def _is_ignored(
    path: Path, root: Path, specs: _Specs, own: GitIgnoreSpec, *, is_folder: bool
) -> bool:
    end = "/" if is_folder else ""
    if own.match_file(path.relative_to(root).as_posix() + end):
        return True
    # As in git, the file nearest to the path has the last word.
    for base, spec in reversed(specs):
        verdict = spec.check_file(path.relative_to(base).as_posix() + end).include
        if verdict is not None:
            return verdict
    return False


def _check_link(path: Path, root: Path) -> None:
    target = path.resolve()
    name = path.relative_to(root)
    if not target.is_relative_to(root):
        raise ConfigError(
            f"{name} must stay inside {root} to be sent, got a link to {target}. Copy the file, "
            "or leave it out with --exclude."
        )
    if path.is_dir() and path.parent.resolve().is_relative_to(target):
        raise ConfigError(
            f"{name} must not lead to a folder around it, got {target}. Leave it out with "
            "--exclude."
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
