"""What one node says of itself: versions, storage, disk, GPUs, build locks; runs on that node.

Knows neither what the others say nor what is good or bad: see `preflight_checks`.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ray._private import worker

import forge_ray
from forge_ray.artifacts import open_filesystem
from forge_ray.errors import ConfigError, ForgeError

LIBRARIES = ("ray", "torch", "deepspeed", "transformers", "optuna", "numpy", "pyarrow")
"""Libraries that must be the same everywhere: what one node writes, another reads."""
_MARK = "forge-ray-doctor-"
_YOUNG_S = 60.0
_SHARED = ("nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "fuse", "9p", "beegfs")
_LOOK_AT_GPUS = """
import torch
print(torch.cuda.device_count())
"""
_LOOK_S = 300


@dataclass(frozen=True, kw_only=True)
class Locks:
    """Locks of half-done builds of torch extensions, which DeepSpeed waits for without end.

    Attributes:
        cleared: Nobody held them; they are gone.
        held: Someone builds, or a network disk hides who does.
    """

    cleared: tuple[str, ...] = ()
    held: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs of a node.

    Attributes:
        asked: How many the node offers to Ray.
        seen: How many torch sees.
        error: Why nobody could look; empty where one could.
    """

    asked: int
    seen: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """One node.

    Attributes:
        name: Host and beginning of Ray's node id.
        versions: Of Python, forge-ray and `LIBRARIES`; empty for what is not installed.
        storage: Which place cannot be used from here, and why; empty where all can.
        disk_free: Bytes free where Ray spills objects and keeps logs.
        disk_size: Bytes of that disk.
        object_store: Bytes of Ray's object store.
        compiler: Why a training could not compile its blocks here; empty where it could, or
            nobody asked.
        gpus: None where none is offered, or nobody looked, as that takes seconds.
        locks: See there.
    """

    name: str
    versions: dict[str, str]
    storage: str
    disk_free: int
    disk_size: int
    object_store: int = 0
    compiler: str = ""
    gpus: Gpus | None = None
    locks: Locks = Locks()


def look(
    marks: Mapping[str, str],
    *,
    name: str = "",
    object_store: int = 0,
    gpus: int = 0,
    compiles: bool = False,
    is_thorough: bool = True,
) -> NodeReport:
    """Looks at this node.

    Args:
        marks: By path or URI that all nodes share, the name of a file there that the driver wrote;
            empty where it could not.
        name: Of the node.
        object_store: Bytes of its object store, which Ray knows.
        gpus: GPUs that it offers to Ray.
        compiles: Whether trainings compile their blocks.
        is_thorough: Whether to take seconds: looks at GPUs, clears locks.
    """
    disk = shutil.disk_usage(ray_folder())
    return NodeReport(
        name=name or socket.gethostname(),
        versions=installed(),
        storage=try_places(marks),
        disk_free=disk.free,
        disk_size=disk.total,
        object_store=object_store,
        compiler=_try_compiler(is_gpu=gpus > 0) if compiles else "",
        gpus=look_at_gpus(gpus) if gpus and is_thorough else None,
        locks=clear_locks(extensions_folder()) if is_thorough else Locks(),
    )


def ray_folder() -> Path:
    """Where the Ray of this node writes (`ray start --temp-dir`); temporary files without one."""
    # Private name: a test pins it.
    node = worker._global_node
    return Path(node.get_session_dir_path() if node else tempfile.gettempdir())


def installed() -> dict[str, str]:
    """Versions by name."""
    found = {"python": platform.python_version(), "forge-ray": forge_ray.__version__}
    return found | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def leave_mark(store: str) -> str:
    """Writes a small file into the store; returns its name.

    Raises:
        OSError: The store cannot be written to.
        ForgeError: Its URI says nothing.
    """
    filesystem, root = open_filesystem(store)
    filesystem.create_dir(root, recursive=True)  # as the store does at its first artifact
    name = f"{_MARK}{uuid.uuid4().hex}"
    with filesystem.open_output_stream(f"{root}/{name}") as sink:
        sink.write(name.encode())
    return name


def remove_mark(store: str, name: str) -> None:
    """Deletes a file that `leave_mark` wrote."""
    filesystem, root = open_filesystem(store)
    filesystem.delete_file(f"{root}/{name}")


def try_places(marks: Mapping[str, str]) -> str:
    """`try_store` of each place; what failed first."""
    for place, mark in marks.items():
        error = try_store(place, mark)
        if error:
            return f"{place}: {error}"
    return ""


def try_store(store: str, mark: str) -> str:
    """Writes, reads and deletes a file, and reads the driver's; what failed, or an empty string."""
    try:
        filesystem, root = open_filesystem(store)
        if mark:
            # Before anything is written: a path that only exists elsewhere would be created here.
            try:
                with filesystem.open_input_stream(f"{root}/{mark}") as source:
                    source.read()
            except FileNotFoundError:
                return "it does not hold what the driver wrote there: the two see different disks"
        own = leave_mark(store)
        with filesystem.open_input_stream(f"{root}/{own}") as source:
            is_same = source.read() == own.encode()
        remove_mark(store, own)
    except (OSError, ForgeError) as error:
        return str(error)
    return "" if is_same else "it gives back other bytes than were written"


def look_at_gpus(asked: int) -> Gpus:
    """Looks from a process of its own: this one may have been given no GPU.

    Args:
        asked: GPUs that the node offers.
    """
    env = {name: one for name, one in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", _LOOK_AT_GPUS]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=True, timeout=_LOOK_S
        )
    except subprocess.TimeoutExpired:
        return Gpus(asked=asked, error=f"torch did not answer within {_LOOK_S} s")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return Gpus(asked=asked, error=lines[-1] if lines else f"exit code {error.returncode}")
    return Gpus(asked=asked, seen=int(done.stdout.splitlines()[-1]))


def _try_compiler(*, is_gpu: bool) -> str:
    import torch

    from forge_ray.gr.compiling import check_compiler

    try:
        check_compiler(torch.device("cuda" if is_gpu else "cpu"))
    except ConfigError as error:
        return str(error)
    return ""


def extensions_folder() -> Path:
    """Where torch builds extensions on this node, all accelerators and Pythons."""
    asked = os.environ.get("TORCH_EXTENSIONS_DIR")
    if asked:
        return Path(asked)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions"


def clear_locks(folder: Path, *, now: float | None = None) -> Locks:
    """Removes locks that no process holds: whoever waits for one waits for ever.

    A build keeps its lock file open, so a lock that is open nowhere was left by a killed process.
    On a disk that other nodes see as well nobody can tell: those are left alone.
    """
    at = time.time() if now is None else now
    found = [one for one in folder.glob("**/lock") if one.is_file()]
    if not found:
        return Locks()
    is_shared = filesystem_type(folder).startswith(_SHARED)
    opened = set(_open_files())
    cleared, held = [], []
    for path in found:
        age = at - path.stat().st_mtime
        if is_shared or str(path.resolve()) in opened or age < _YOUNG_S:
            held.append(str(path))
        else:
            path.unlink(missing_ok=True)
            cleared.append(str(path))
    return Locks(cleared=tuple(sorted(cleared)), held=tuple(sorted(held)))


def filesystem_type(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Type of the file system that a folder lies on; empty where the system does not say."""
    if not mounts.exists():
        return ""
    rows = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    place = folder.resolve()
    # Of two mounts in one place the later one is seen.
    holding = [(len(row[1]), number) for number, row in enumerate(rows) if _holds(row[1], place)]
    return rows[max(holding)[1]][2] if holding else ""


def _holds(mount: str, place: Path) -> bool:
    root = Path(mount.replace("\\040", " "))
    return place == root or root in place.parents


def _open_files() -> Iterator[str]:
    """Files that processes of this node have open, as far as we may see."""
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = list(process.iterdir())
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue  # someone else's, or just gone
        yield from (target for one in links if (target := _target(one)))


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""  # closed meanwhile
