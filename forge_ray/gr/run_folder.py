"""The folder of one training run: its checkpoints, its best weights, its rows, its ending.

::

    <run>/forge-run.json            whose run this is
          checkpoints/step_…/       shards of all workers; checkpoint.json is written last
          best/step_….safetensors   weights of the best validations
          history.json              one row per validation
          outcome.json              how training ended
          stop                      asks a running training to save and end

Checkpoints are kept here and not by Ray Train: a checkpoint exists once its manifest does, its
files are checked against the sizes in the manifest, and whichever is the newest whole one serves.
Ray keeps a list of its own and refuses to start when a folder of that list is gone.

Knows files on any pyarrow filesystem. Knows nothing about models, Ray or DeepSpeed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import fs as pafs

from forge_ray.artifacts import open_filesystem
from forge_ray.errors import ArtifactError
from forge_ray.gr.checkpoint import (
    MANIFEST_FILE,
    CheckpointManifest,
    DamagedCheckpointError,
    RunIdentity,
    parse_manifest,
)
from forge_ray.leases import list_entries

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
BEST = "best"
OUTCOME_FILE = "outcome.json"
STOP_FILE = "stop"


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint of a step; names sort as steps do."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class FoundCheckpoint:
    """What a run continues from.

    Attributes:
        name: of the checkpoint's folder; empty where there is none.
        manifest: its manifest, None where there is none.
        warnings: newer checkpoints that were passed over, one sentence each.
    """

    name: str
    manifest: CheckpointManifest | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; picklable.

    Attributes:
        uri: absolute path or URI, as a user would write it.
        filesystem: that holds it.
        root: the path inside the filesystem.
    """

    uri: str
    filesystem: pafs.FileSystem
    root: str

    @classmethod
    def open(cls, run_dir: str, name: str) -> RunFolder:
        """The folder of run `name` below `run_dir`; creates nothing."""
        filesystem, root = open_filesystem(run_dir)
        return cls(f"{run_dir.rstrip('/')}/{name}", filesystem, f"{root}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether files can be opened by their path."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """A path inside the filesystem."""
        return "/".join((self.root, *parts))

    def exists(self, *parts: str) -> bool:
        """Whether a file is there."""
        return bool(self.filesystem.get_file_info(self.path(*parts)).is_file)

    def read_json(self, *parts: str) -> Any:
        """Content of a JSON file, None where it is missing or unreadable."""
        try:
            with self.filesystem.open_input_stream(self.path(*parts)) as source:
                return json.loads(source.read())
        except (FileNotFoundError, ValueError):
            return None

    def write_json(self, content: Any, *parts: str) -> None:
        """Writes a JSON file; a reader sees the old or the new content."""
        self.write(json.dumps(content).encode(), *parts)

    def write(self, content: bytes, *parts: str) -> None:
        """Writes a small file in one piece."""
        path = self.path(*parts)
        self.filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        # An object store publishes a file when it is closed; on a disk a rename does.
        target = f"{path}.part" if self.is_local else path
        with self.filesystem.open_output_stream(target) as sink:
            sink.write(content)
        if self.is_local:
            self.filesystem.move(target, path)

    def delete(self, *parts: str) -> None:
        """Removes a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(*parts))

    def copy(self, source: Sequence[str], target: Sequence[str]) -> None:
        """Copies a file inside the folder; the target appears whole."""
        path = self.path(*target)
        self.filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        if not self.is_local:
            self.filesystem.copy_file(self.path(*source), path)
            return
        self.filesystem.copy_file(self.path(*source), f"{path}.part")
        self.filesystem.move(f"{path}.part", path)

    @contextlib.contextmanager
    def local(self, *parts: str) -> Iterator[Path]:
        """A file as a local path, for libraries that read nothing else."""
        if self.is_local:
            yield Path(self.path(*parts))
            return
        with tempfile.TemporaryDirectory(prefix="forge-ray-") as folder:
            target = Path(folder, parts[-1])
            self._copy_files({parts[-1]: self.path(*parts)}, Path(folder))
            yield target

    def names(self, folder: str) -> list[str]:
        """Names inside a sub-folder, sorted; none where it is missing."""
        entries = list_entries(self.filesystem, self.path(folder))
        return sorted(entry.base_name for entry in entries)

    @contextlib.contextmanager
    def new_checkpoint(self, name: str) -> Iterator[Path]:
        """A local folder in which one worker writes its part of a checkpoint.

        On a local disk it is the checkpoint's own folder, on other storage a temporary one that is
        copied there at the end of the block.
        """
        target = self.path(CHECKPOINTS, name)
        self.filesystem.create_dir(target, recursive=True)
        if self.is_local:
            yield Path(target)
            return
        with tempfile.TemporaryDirectory(prefix="forge-ray-checkpoint-") as folder:
            yield Path(folder)
            pafs.copy_files(folder, target, destination_filesystem=self.filesystem)

    def clear_checkpoint(self, name: str) -> None:
        """Removes what an interrupted attempt left under a name."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path(CHECKPOINTS, name))

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of every file of a checkpoint, by path relative to it."""
        base = self.path(CHECKPOINTS, name)
        entries = list_entries(self.filesystem, base, recursive=True)
        return {
            entry.path[len(base) + 1 :]: int(entry.size)
            for entry in entries
            if entry.type == pafs.FileType.File
        }

    def is_whole(self, name: str, file: str) -> bool:
        """Whether a file of a checkpoint has the size that the manifest says."""
        manifest = self.read_json(CHECKPOINTS, name, MANIFEST_FILE)
        files = manifest.get("files") if isinstance(manifest, dict) else None
        info = self.filesystem.get_file_info(self.path(CHECKPOINTS, name, file))
        return isinstance(files, dict) and info.is_file and files.get(file) == info.size

    def commit(self, name: str, manifest: CheckpointManifest, *, keep: int) -> None:
        """Publishes a checkpoint whose files are all there, and drops the oldest beyond `keep`.

        The one that is being validated stays as well, and with a `keep` of 0 all of them do.
        """
        self.write(manifest.to_json().encode(), CHECKPOINTS, name, MANIFEST_FILE)
        pending = manifest.progress.pending
        needed = {name, checkpoint_name(pending["global_step"]) if pending else name}
        committed = [one for one in self.names(CHECKPOINTS) if self._is_committed(one)]
        for old in committed[:-keep] if keep else []:
            if old not in needed:
                self.clear_checkpoint(old)

    def drop_unusable(self, name: str) -> None:
        """Removes what is newer than a checkpoint, or was never finished.

        Whatever training wrote after the checkpoint it continues from would count as newer than all
        that it writes next.

        Args:
            name: of the checkpoint; an empty one removes all.
        """
        for other in self.names(CHECKPOINTS):
            if other > name or not self._is_committed(other):
                self.clear_checkpoint(other)

    def _is_committed(self, name: str) -> bool:
        """Whether the writer of a checkpoint came to its end."""
        return self.exists(CHECKPOINTS, name, MANIFEST_FILE)

    def newest_checkpoint(self, identity: RunIdentity) -> FoundCheckpoint:
        """The newest whole checkpoint; damaged ones are passed over and named.

        Raises:
            ArtifactError: A checkpoint belongs to another configuration, SID table or dataset.
        """
        damage: list[str] = []
        for name in reversed(self.names(CHECKPOINTS)):
            if not self._is_committed(name):
                continue  # its writer was interrupted; it never was a checkpoint
            try:
                manifest = self.read_manifest(name, identity)
            except DamagedCheckpointError as error:
                damage.append(str(error))
                continue
            return FoundCheckpoint(
                name, manifest, tuple(f"{one} An older checkpoint is used." for one in damage)
            )
        return FoundCheckpoint(
            "",
            None,
            tuple(f"{one} No older one is whole: training starts afresh." for one in damage),
        )

    def read_manifest(self, name: str, identity: RunIdentity) -> CheckpointManifest:
        """The manifest of a checkpoint that is whole and belongs to this run.

        Raises:
            DamagedCheckpointError: A file is missing or has another size than it was written with.
            ArtifactError: It belongs to another run.
        """
        where = f"{self.uri}/{CHECKPOINTS}/{name}"
        with self.filesystem.open_input_stream(
            self.path(CHECKPOINTS, name, MANIFEST_FILE)
        ) as source:
            manifest = parse_manifest(source.read().decode(), f"{where}/{MANIFEST_FILE}", identity)
        found = self.sizes(name)
        for file, size in manifest.files.items():
            if found.get(file) != size:
                got = f"{found[file]} bytes" if file in found else "no such file"
                raise DamagedCheckpointError(f"{where}/{file} must have {size} bytes, got {got}.")
        return manifest

    @contextlib.contextmanager
    def checkpoint(self, name: str, files: Sequence[str]) -> Iterator[Path]:
        """Some files of a checkpoint as a local folder that holds nothing else.

        Whatever an attempt with another number of workers left beside them is not seen.
        """
        with tempfile.TemporaryDirectory(prefix="forge-ray-checkpoint-") as folder:
            paths = {file: self.path(CHECKPOINTS, name, file) for file in files}
            self._copy_files(paths, Path(folder))
            yield Path(folder)

    def _copy_files(self, paths: Mapping[str, str], folder: Path) -> None:
        for file, path in paths.items():
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.is_local:
                target.symlink_to(path)
                continue
            try:
                with (
                    self.filesystem.open_input_stream(path) as source,
                    target.open("wb") as sink,
                ):
                    shutil.copyfileobj(source, sink, 1 << 20)
            except (OSError, pyarrow.ArrowInvalid) as error:
                raise ArtifactError(
                    f"{path} must be readable, got: {error}. Run the same command again."
                ) from error
