"""What a node says of itself: a real store, real locks, real file systems."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import ray

from forge_ray.launch import preflight_node
from forge_ray.launch.preflight_node import (
    Gpus,
    clear_locks,
    filesystem_type,
    installed,
    leave_mark,
    look,
    look_at_gpus,
    ray_folder,
    remove_mark,
    try_store,
)


def test_a_store_is_written_read_and_left_clean(tmp_path: Path) -> None:
    store = str(tmp_path / "new" / "store")
    mark = leave_mark(store)
    assert try_store(store, mark) == ""
    remove_mark(store, mark)
    assert list(Path(store).iterdir()) == []


def test_a_folder_of_its_own_is_not_the_drivers_store(tmp_path: Path) -> None:
    """Every node may write to its own /data; only the driver's file shows that they differ."""
    missing = tmp_path / "elsewhere"
    assert "different disks" in try_store(str(missing), "forge-ray-doctor-1")
    assert not missing.exists()


def test_a_store_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("no folder")
    assert try_store(str(taken / "store"), "") != ""
    assert "nowhere" in try_store("nowhere://x", "")


def test_locks_are_looked_for_where_torch_builds(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = make_lock(tmp_path, age_s=600)
    assert look({str(tmp_path / "store"): ""}).locks.cleared == (str(lock),)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "denied" in try_store(str(tmp_path), "").lower()


def make_lock(folder: Path, *, age_s: float) -> Path:
    path = folder / "py311_cpu" / "op" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_lock_that_nobody_holds_goes(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, age_s=600)
    locks = clear_locks(tmp_path)
    assert locks.cleared == (str(lock),)
    assert not lock.exists()


def test_a_lock_that_a_build_holds_stays(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, age_s=600)
    with lock.open():
        locks = clear_locks(tmp_path)
    assert locks.held == (str(lock),)
    assert lock.exists()


def test_a_young_lock_and_one_on_a_network_disk_stay(tmp_path: Path, monkeypatch) -> None:
    young = make_lock(tmp_path, age_s=1)
    assert clear_locks(tmp_path).held == (str(young),)
    old = make_lock(tmp_path, age_s=600)
    monkeypatch.setattr(preflight_node, "filesystem_type", lambda folder: "nfs4")
    assert clear_locks(tmp_path).held == (str(old),)


def test_file_systems_are_told_apart(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/a / ext4 rw 0 0\nserver:/x /net nfs4 rw 0 0\nserver:/y /net/a\\040b cifs rw 0 0\n"
        "tmpfs /net tmpfs rw 0 0\n"
    )
    assert filesystem_type(Path("/home/x"), mounts) == "ext4"
    assert filesystem_type(Path("/net/x"), mounts) == "tmpfs"  # mounted over the other
    assert filesystem_type(Path("/net/a b/c"), mounts) == "cifs"
    assert filesystem_type(Path("/network"), mounts) == "ext4"


@pytest.mark.ray
def test_the_disk_is_the_one_that_ray_writes_to(ray_local: None, monkeypatch) -> None:
    monkeypatch.setattr(preflight_node.tempfile, "gettempdir", lambda: "/nowhere")
    here = ray_folder()
    assert (here / "logs").is_dir()
    assert ray.get(ray.remote(num_cpus=0)(ray_folder).remote()) == here
    disks = {here: shutil.disk_usage("/")._replace(free=7)}
    monkeypatch.setattr(preflight_node.shutil, "disk_usage", disks.__getitem__)
    assert look({}).disk_free == 7


def test_versions_are_those_of_this_process() -> None:
    found = installed()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["ray"].startswith("2.60")


def test_gpus_are_counted_in_a_process_that_sees_them_all(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    show = "import os; print('noise'); print(2 if 'CUDA_VISIBLE_DEVICES' not in os.environ else 0)"
    monkeypatch.setattr(preflight_node, "_LOOK_AT_GPUS", show)
    assert look({str(tmp_path): ""}, gpus=2).gpus == Gpus(asked=2, seen=2)
    assert look({str(tmp_path): ""}, gpus=2, is_thorough=False).gpus is None
    assert look({str(tmp_path): ""}).gpus is None
    monkeypatch.setattr(preflight_node, "_LOOK_AT_GPUS", "raise SystemExit('no torch here')")
    assert look_at_gpus(2).error == "no torch here"
