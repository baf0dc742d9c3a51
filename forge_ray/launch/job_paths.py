"""Where a submitted sweep may read and write: its working tree, the store, and named folders.

A job runs with the rights of the cluster, so a path of a sweep file is checked before it is sent.
The check is textual: what the cluster's disks hold is not visible from here.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from forge_ray.config import to_mapping
from forge_ray.errors import ConfigError
from forge_ray.launch.working_tree import WorkingTree
from forge_ray.secrets import masked
from forge_ray.sweep.config import SweepConfig

_KEPT = ("folder", "storage", "trackers.tensorboard.folder", "trackers.mlflow.tracking_uri")
"""Fields that name a place to write to, which must outlive the job's own folder."""
_FILE_SCHEMES = ("file", "sqlite")


def file_in_tree(file: Path, root: Path) -> str:
    """A sweep file's path from the root of the tree, which is how the job names it.

    Raises:
        ConfigError: It lies outside, also by a link.
    """
    root = root.resolve()
    path = Path(posixpath.normpath(root / file))
    if not path.is_relative_to(root) or not path.resolve().is_relative_to(root):
        raise ConfigError(
            f"the sweep file must lie below {root}, which is what the job gets, got {file}. Run "
            "the command in the folder that holds it."
        )
    return path.relative_to(root).as_posix()


def check_store(uri: str) -> None:
    """Refuses a store that the cluster could not find, or that would show a password.

    Raises:
        ConfigError: See above.
    """
    if not uri or ("://" not in uri and not uri.startswith("/")):
        raise ConfigError(
            "--store must be a URI or an absolute path that every node of the cluster sees, got "
            f"{uri!r}. Pass s3://bucket/prefix or /a/shared/disk."
        )
    _check_text("--store", uri, roots=(uri,))


def check_paths(
    config: SweepConfig, *, store: str, shared: Sequence[str], tree: WorkingTree | None
) -> None:
    """Refuses a sweep with a path that leads out of its tree, its store and the shared folders.

    Args:
        config: The sweep.
        store: The store's URI or absolute path.
        shared: More absolute folders of the cluster that the sweep may use.
        tree: What travels; None where an image holds the files.

    Raises:
        ConfigError: A path leads out, is lost with the job, does not travel, or shows a password.
    """
    for folder in shared:
        if not folder.startswith("/") or posixpath.normpath(folder) == "/":
            raise ConfigError(
                f"--shared must be an absolute folder below /, got {folder!r}. Name the mount."
            )
    roots = (store, *shared)
    for field, text in _texts(to_mapping(config)):
        _check_text(field, text, roots=roots)
        path = _file_path(text)
        if path.startswith("/"):
            continue
        if field in _KEPT and path:
            raise ConfigError(
                f"{field} must be absolute in a job, got {masked(text)!r}: what lies beside the "
                "job's files is gone with it. Write a path in the store, or leave it out."
            )
        if tree is not None:
            _check_travels(field, path, tree)


def disk_folders(store: str, shared: Sequence[str]) -> list[str]:
    """Folders of the nodes' disks that a sweep may use: store and shared ones, none in another."""
    folders = {posixpath.normpath(one) for one in (store, *shared) if "://" not in one}
    return sorted(one for one in folders if not any(_is_within(one, x) for x in folders - {one}))


def _check_text(field: str, text: str, *, roots: Sequence[str]) -> None:
    if masked(text) != text:
        raise ConfigError(
            f"{field} must hold no password in a job, got {masked(text)!r}: whoever may see jobs "
            "sees it. Leave it out and set it on the nodes (PGPASSFILE for PostgreSQL, instance "
            "roles for buckets)."
        )
    path = _file_path(text)
    if ".." in PurePosixPath(path).parts or path.startswith("~"):
        raise ConfigError(
            f"{field} must hold no '..' and no '~' in a job, got {text!r}. Write the path itself."
        )
    if path.startswith("/") and not any(_is_within(path, root) for root in roots):
        raise ConfigError(
            f"{field} must lie in the store or a shared folder ({', '.join(roots)}) in a job, got "
            f"{text!r}. Put it there, write it relative to the working tree, or allow its folder "
            "with --shared."
        )


def _check_travels(field: str, path: str, tree: WorkingTree) -> None:
    is_path = field == "data" or "/" in path
    if path and is_path and (tree.root / path).exists() and not tree.holds(path):
        raise ConfigError(
            f"{field} must be sent with the working tree to be found, got {path!r}, which is left "
            "out of it. Put it into the store, or take it out of .gitignore."
        )


def _texts(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _texts(one, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list):
        for place, one in enumerate(value):
            yield from _texts(one, f"{at}[{place}]")


def _file_path(text: str) -> str:
    """The path in a text that names a file: all of it, or that of a file's URL; else empty."""
    if "://" not in text:
        return text
    scheme, _, rest = text.partition("://")
    if scheme.partition("+")[0] not in _FILE_SCHEMES:
        return ""
    path = rest.partition("?")[0]
    # sqlite:///a is relative and sqlite:////a is absolute; file:///a is absolute.
    return path[1:] if scheme.startswith("sqlite") else urlsplit(text).path


def _is_within(path: str, root: str) -> bool:
    # A root that is a URI holds no path of a disk.
    return PurePosixPath(path).is_relative_to(posixpath.normpath(root))
