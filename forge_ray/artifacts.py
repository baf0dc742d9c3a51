"""Content-addressed artifacts on any pyarrow filesystem: nothing is computed twice.

An artifact is the directory `<store>/<kind>/<name>-<key12>/`, named by the hash of the stage's
configuration and its inputs' keys. Its `manifest.json` is written last, so a directory without one
does not exist for readers. On a filesystem with renames an artifact is built in a hidden sibling
and moved into place; on an object store it is built in place and the manifest publishes it.

This module knows nothing of Ray, of datasets or of models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import fs as pafs

from forge_ray.config import canonical_json
from forge_ray.errors import ArtifactError
from forge_ray.leases import Lease, list_entries

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_VERSIONED = ("forge-ray", "ray", "deepspeed", "torch", "numpy", "pyarrow", "faiss-cpu", "optuna")
_STAGING = ".staging-"


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """What a stage says about the artifact it wrote."""

    rows: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything known of an artifact; stored as `manifest.json` in its directory.

    Attributes:
        config: Resolved configuration of the stage, re-runnable as it is.
        parents: Keys of the input artifacts.
        files: Size in bytes of every file, by path relative to the artifact.
        command: Shell command that rebuilds the artifact.
    """

    kind: str
    name: str
    key: str
    parents: tuple[str, ...]
    config: dict[str, Any]
    rows: dict[str, int]
    metrics: dict[str, Any]
    files: dict[str, int]
    versions: dict[str, str]
    created: str
    command: str
    schema_version: int

    @property
    def ref(self) -> str:
        """Short address inside the store: `kind/name-key12`."""
        return f"{self.kind}/{self.name}-{self.key[:12]}"

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, path: str) -> Manifest:
        """Parses a manifest.

        Raises:
            ArtifactError: The text is not a manifest; names `path`.
        """
        try:
            raw = json.loads(text)
            return cls(**{**raw, "parents": tuple(raw["parents"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{path} must be an artifact manifest, got {error}. Remove the artifact directory."
            ) from error


class Artifact:
    """Read access to one published artifact."""

    manifest: Manifest
    filesystem: pafs.FileSystem
    root: str
    """Path of the artifact's directory inside `filesystem`."""
    is_new: bool
    """Whether the call that returned it produced it; false for what was found or waited for."""

    def __init__(
        self, manifest: Manifest, filesystem: pafs.FileSystem, root: str, *, is_new: bool = False
    ) -> None:
        self.manifest = manifest
        self.filesystem = filesystem
        self.root = root
        self.is_new = is_new

    @property
    def key(self) -> str:
        """Full content key, 64 hex digits."""
        return self.manifest.key

    @property
    def uri(self) -> str:
        """Where the artifact is, for people: its path, prefixed by the filesystem when remote."""
        is_local = isinstance(self.filesystem, pafs.LocalFileSystem)
        return self.root if is_local else f"{self.filesystem.type_name}://{self.root}"

    def path(self, *parts: str) -> str:
        """Path of a file inside `filesystem`."""
        return "/".join([self.root, *parts])

    def files(self, prefix: str) -> list[str]:
        """Paths of the files below `prefix`, in name order."""
        start = prefix.rstrip("/") + "/"
        return [self.path(name) for name in sorted(self.manifest.files) if name.startswith(start)]

    def exists(self, *parts: str) -> bool:
        """Whether a file, or a folder with files, of this name belongs to the artifact."""
        name = "/".join(parts)
        return name in self.manifest.files or bool(self.files(name))

    def local(self, *parts: str) -> Path:
        """A file as a local path; a remote one is downloaded once a machine and key."""
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            return Path(self.path(*parts))
        target = Path(tempfile.gettempdir(), "forge-ray-cache", self.key, *parts)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
            remote = self.filesystem.open_input_stream(self.path(*parts))
            with remote as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            partial.replace(target)
        return target


class ArtifactWriter:
    """Write access to an artifact that is being built."""

    filesystem: pafs.FileSystem
    root: str
    scratch: str
    """Folder inside `filesystem` that a killed build leaves to the next one of the same key, and
    that publishing deletes; only the holder of the lease touches it. It may not exist yet."""

    def __init__(self, filesystem: pafs.FileSystem, root: str, scratch: str) -> None:
        self.filesystem = filesystem
        self.root = root
        self.scratch = scratch

    def path(self, *parts: str) -> str:
        """Path for a file inside `filesystem`; its folder exists afterwards."""
        whole = "/".join([self.root, *parts])
        self.filesystem.create_dir(whole.rsplit("/", 1)[0], recursive=True)
        return whole

    def open(self, *parts: str) -> BinaryIO:
        """A binary stream that writes one file; close it (use `with`)."""
        return self.filesystem.open_output_stream(self.path(*parts))

    @contextmanager
    def local_path(self, *parts: str) -> Iterator[Path]:
        """A local path to write one file to; it belongs to the artifact after the block."""
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            yield Path(self.path(*parts))
            return
        with tempfile.TemporaryDirectory(prefix="forge-ray-") as folder:
            local = Path(folder, parts[-1])
            yield local
            with local.open("rb") as source, self.open(*parts) as sink:
                shutil.copyfileobj(source, sink)


class ArtifactStore:
    """All artifacts below one path or URI (`./forge-store`, `s3://bucket/prefix?region=…`).

    Safe for concurrent builders, in threads, processes and machines; picklable.
    """

    uri: str
    filesystem: pafs.FileSystem
    root: str

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri) if "://" in str(uri) else str(Path(uri).resolve())
        self.filesystem, self.root = open_filesystem(self.uri)

    def __reduce__(self) -> tuple[type[ArtifactStore], tuple[str]]:
        return ArtifactStore, (self.uri,)

    @staticmethod
    def key(
        kind: str, config: Mapping[str, Any], parents: Sequence[str] = (), schema_version: int = 1
    ) -> str:
        """Content key of an artifact: SHA-256 over everything that decides its bytes."""
        content = {
            "kind": kind,
            "config": dict(config),
            "parents": list(parents),
            "schema_version": schema_version,
        }
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def find(self, kind: str, key: str) -> Artifact | None:
        """The published artifact of this key, or None.

        Raises:
            ArtifactError: It is there, but a file is missing or has another size.
        """
        for path in self._directories(kind):
            if path.endswith(f"-{key[:12]}"):
                return self._load(path)
        return None

    def open(self, ref: str | Path, *, kind: str | None = None) -> Artifact:
        """Opens an artifact by directory, by `kind/name-key12`, by key prefix or by unique name.

        Args:
            ref: The address.
            kind: Looks among artifacts of this kind only, so that a name may serve several kinds;
                a directory is opened whatever its kind.

        Raises:
            ArtifactError: Nothing, or more than one artifact, answers to `ref`; or it is damaged.
        """
        text = str(ref).rstrip("/")
        if "://" in text or Path(text, MANIFEST).is_file():
            outside = ArtifactStore(text)
            artifact = outside._load(outside.root)
            if artifact is None:
                raise ArtifactError(f"{text} must hold {MANIFEST}, got none. Check the path.")
            return artifact
        found = [m for m in self.manifests(kind) if _answers(m, text)]
        if len(found) != 1:
            names = ", ".join(m.ref for m in found) or "nothing"
            raise ArtifactError(
                f"{text!r} must name one {kind or 'artifact'} in {self.uri}, got {names}. "
                "List them with `forge-ray artifacts ls`."
            )
        path = f"{self.root}/{found[0].ref}"
        artifact = self._load(path)
        if artifact is None:
            raise ArtifactError(f"{path} must exist, got removed meanwhile. Build it again.")
        return artifact

    def build(
        self,
        kind: str,
        name: str,
        config: Mapping[str, Any],
        *,
        produce: Callable[[ArtifactWriter], ArtifactInfo | None],
        parents: Sequence[str] = (),
        command: str = "",
        schema_version: int = 1,
    ) -> Artifact:
        """Returns the artifact of this content, producing it unless it exists.

        One builder works, others with the same key wait for it; a builder that died is replaced.

        Args:
            kind: Folder of the store, e.g. `datasets`.
            name: For people; not part of the key.
            config: Resolved configuration, JSON types only.
            produce: Writes the files; what it returns goes to the manifest.
            parents: Keys of the input artifacts.
            command: Shell command that rebuilds the artifact.
            schema_version: Raise it when the layout of this kind changes.

        Raises:
            ArtifactError: The name cannot be a folder that is found again.
        """
        if "/" in name or name.startswith("."):
            raise ArtifactError(
                f"artifact name must not hold / or start with a dot, got {name!r}. Change the name."
            )
        key = self.key(kind, config, parents, schema_version)
        found = self.find(kind, key)
        if found is not None:
            return found
        lease_dir = f"{self.root}/.leases/{kind}-{key[:12]}"
        with Lease(self.filesystem, lease_dir) as lease:
            lease.wait_until_held(lambda: self.find(kind, key) is not None)
            found = self.find(kind, key)
            if found is not None:
                return found
            path = f"{self.root}/{kind}/{name}-{key[:12]}"
            writer = self._writer(path, kind, key)
            info = produce(writer) or ArtifactInfo()
            manifest = Manifest(
                kind=kind,
                name=name,
                key=key,
                parents=tuple(parents),
                config=dict(config),
                rows=dict(info.rows),
                metrics=dict(info.metrics),
                files=self._sizes(writer.root),
                versions=_versions(),
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                command=command,
                schema_version=schema_version,
            )
            return self._publish(writer, path, manifest)

    def manifests(self, kind: str | None = None) -> list[Manifest]:
        """Manifests of all published artifacts (of one kind), oldest first."""
        kinds = [kind] if kind else self._kinds()
        found = [m for one in kinds for path in self._directories(one) if (m := self._read(path))]
        return sorted(found, key=lambda manifest: (manifest.created, manifest.ref))

    def remove(self, ref: str, *, force: bool = False) -> Manifest:
        """Deletes an artifact.

        Raises:
            ArtifactError: Another artifact was built from it, and `force` is not set.
        """
        found = [m for m in self.manifests() if _answers(m, ref.rstrip("/"))]
        if len(found) != 1:
            names = ", ".join(m.ref for m in found) or "nothing"
            raise ArtifactError(f"{ref!r} must name one artifact, got {names}. Give its key.")
        children = [m.ref for m in self.manifests() if found[0].key in m.parents]
        if children and not force:
            raise ArtifactError(
                f"{found[0].ref} must have no children to be removed, got {', '.join(children)}. "
                "Remove those first, or pass --force."
            )
        # The manifest goes first: readers never see half an artifact as a whole one.
        path = f"{self.root}/{found[0].ref}"
        self.filesystem.delete_file(f"{path}/{MANIFEST}")
        self.filesystem.delete_dir(path)
        return found[0]

    def _kinds(self) -> list[str]:
        entries = list_entries(self.filesystem, self.root)
        hidden = (one.base_name for one in entries if one.type == pafs.FileType.Directory)
        return sorted(name for name in hidden if not name.startswith("."))

    def _directories(self, kind: str) -> list[str]:
        entries = list_entries(self.filesystem, f"{self.root}/{kind}")
        return sorted(
            one.path
            for one in entries
            if one.type == pafs.FileType.Directory and not one.base_name.startswith(".")
        )

    def _read(self, path: str) -> Manifest | None:
        manifest_path = f"{path}/{MANIFEST}"
        if self.filesystem.get_file_info(manifest_path).type != pafs.FileType.File:
            return None
        with self.filesystem.open_input_stream(manifest_path) as stream:
            return Manifest.from_json(stream.read().decode(), path=manifest_path)

    def _load(self, path: str) -> Artifact | None:
        manifest = self._read(path)
        if manifest is None:
            return None
        sizes = self._sizes(path)
        for name, size in manifest.files.items():
            if sizes.get(name) != size:
                state = "none" if name not in sizes else f"{sizes[name]} bytes"
                rebuild = manifest.command or "the command that built it"
                raise ArtifactError(
                    f"{path}/{name} must have {size} bytes, got {state}. Remove the artifact "
                    f"(`forge-ray artifacts rm {manifest.ref}`) and rebuild it: {rebuild}"
                )
        return Artifact(manifest, self.filesystem, path)

    def _sizes(self, path: str) -> dict[str, int]:
        return {
            one.path[len(path) + 1 :]: one.size
            for one in list_entries(self.filesystem, path, recursive=True)
            if one.type == pafs.FileType.File and one.base_name != MANIFEST
        }

    @property
    def _renames(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def _writer(self, path: str, kind: str, key: str) -> ArtifactWriter:
        scratch = f"{self.root}/.scratch/{kind}-{key[:12]}"
        return ArtifactWriter(self.filesystem, self._staging(path, key), scratch)

    def _staging(self, path: str, key: str) -> str:
        """An empty place to build in; what a dead builder of this key left is deleted."""
        folder = path.rsplit("/", 1)[0]
        if not self._renames:
            self._delete(path)
            return path
        for entry in list_entries(self.filesystem, folder):
            if entry.base_name.startswith(f"{_STAGING}{key[:12]}"):
                self._delete(entry.path)
        staging = f"{folder}/{_STAGING}{key[:12]}-{uuid.uuid4().hex[:8]}"
        self.filesystem.create_dir(staging, recursive=True)
        return staging

    def _publish(self, writer: ArtifactWriter, path: str, manifest: Manifest) -> Artifact:
        with writer.open(MANIFEST) as stream:
            stream.write(manifest.to_json().encode())
        if self._renames:
            if self._read(path) is None:
                self._delete(path)
                self.filesystem.move(writer.root, path)
            else:  # a builder that had lost its lease was faster; the content is the same
                self._delete(writer.root)
        logger.info("published %s", manifest.ref)
        self._delete(writer.scratch)
        return Artifact(manifest, self.filesystem, path, is_new=True)

    def _delete(self, path: str) -> None:
        if self.filesystem.get_file_info(path).type == pafs.FileType.Directory:
            self.filesystem.delete_dir(path)


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """A pyarrow filesystem and the path inside it, from a local path or a URI.

    Raises:
        ArtifactError: The URI's scheme or options are unknown.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).resolve())
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise ArtifactError(
            f"store must be a path or a URI that pyarrow reads, got {uri!r}: {error}"
        ) from error
    return filesystem, path.rstrip("/")


@contextmanager
def timed(metrics: dict[str, Any], name: str) -> Iterator[None]:
    """Adds the seconds of a block to `metrics[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        metrics[name] = round(metrics.get(name, 0.0) + time.perf_counter() - start, 3)


def _answers(manifest: Manifest, ref: str) -> bool:
    short = manifest.ref.split("/", 1)[1]
    is_key = len(ref) >= 6 and manifest.key.startswith(ref)
    return ref in (manifest.ref, short, manifest.name) or is_key


def _versions() -> dict[str, str]:
    versions = {name: version for name in _VERSIONED if (version := _version(name))}
    return {"python": platform.python_version(), **versions}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # running from a source tree that was never installed
