from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forge_ray.data.stream import Cursor
from forge_ray.errors import ArtifactError
from forge_ray.gr.checkpoint import MANIFEST_FILE, CheckpointManifest, Progress, RunIdentity
from forge_ray.gr.run_folder import CHECKPOINTS, RunFolder, checkpoint_name

IDENTITY = RunIdentity(
    config_hash="c" * 64,
    table_key="a" * 64,
    dataset_key="d" * 64,
    zero_stage=1,
    precision="fp32",
)
SHARD = "engine/shard-0.pt"


def manifest(step: int) -> CheckpointManifest:
    progress = Progress(step, Cursor(1, 2, 3), 99, ({"loss": 1.5},), {"global_step": step})
    return CheckpointManifest(IDENTITY, progress, 2, {SHARD: 4})


def save(folder: RunFolder, step: int, *, keep: int = 9, pending: int | None = None) -> None:
    name = checkpoint_name(step)
    with folder.new_checkpoint(name) as local:
        (local / "engine").mkdir()
        (local / SHARD).write_bytes(b"%04d" % step)
    written = manifest(step)
    if pending is not None:
        progress = replace(written.progress, pending={"global_step": pending})
        written = replace(written, progress=progress)
    folder.commit(name, written, keep=keep)


@pytest.fixture(params=["path", "uri"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> RunFolder:
    """A run on a local disk, and one on storage that is reached by a URI."""
    opened = RunFolder.open(str(tmp_path), "run")
    if request.param == "path":
        return opened
    from pyarrow import fs as pafs

    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    return RunFolder("mock://run", remote, "run")


def shard_path(tmp_path: Path, step: int) -> Path:
    return tmp_path / "run" / CHECKPOINTS / checkpoint_name(step) / SHARD


def test_a_checkpoint_comes_back_as_written(folder):
    save(folder, 7)
    found = folder.newest_checkpoint(IDENTITY)
    assert found.manifest == manifest(7)
    with folder.checkpoint(found.name, [SHARD]) as files:
        assert (files / SHARD).read_bytes() == b"0007"


def test_the_newest_ones_are_kept(folder):
    for step in (5, 10, 15):
        save(folder, step, keep=2)
    assert folder.names(CHECKPOINTS) == [checkpoint_name(10), checkpoint_name(15)]


def test_a_checkpoint_that_is_being_validated_is_kept(folder):
    for step in (5, 10, 15):
        save(folder, step, keep=2, pending=5)
    assert folder.names(CHECKPOINTS) == [checkpoint_name(step) for step in (5, 10, 15)]
    save(folder, 20, keep=2)
    assert folder.names(CHECKPOINTS) == [checkpoint_name(step) for step in (15, 20)]


def test_keeping_nothing_in_particular_keeps_all(folder):
    for step in (5, 10, 15):
        save(folder, step, keep=0)
    assert len(folder.names(CHECKPOINTS)) == 3


def test_the_checkpoint_just_committed_stays_beside_newer_ones(folder):
    for step in (10, 15, 5):
        save(folder, step, keep=2)
    assert checkpoint_name(5) in folder.names(CHECKPOINTS)


def test_two_damaged_newer_ones_make_room_for_an_older_step(folder, tmp_path):
    for step in (10, 15):
        save(folder, step, keep=2)
        shard_path(tmp_path, step).write_bytes(b"1")
    with folder.new_checkpoint(checkpoint_name(20)) as local:
        (local / "half").write_bytes(b"x")
    found = folder.newest_checkpoint(IDENTITY)
    assert (found.name, len(found.warnings)) == ("", 2)
    assert all("training starts afresh" in warning for warning in found.warnings)
    folder.drop_unusable(found.name)
    save(folder, 5, keep=2)
    assert folder.names(CHECKPOINTS) == [checkpoint_name(5)]
    assert folder.newest_checkpoint(IDENTITY).name == checkpoint_name(5)


def test_only_what_follows_the_restored_one_is_dropped(folder):
    for step in (5, 10, 15):
        save(folder, step)
    with folder.new_checkpoint(checkpoint_name(7)) as local:
        (local / "half").write_bytes(b"x")
    folder.drop_unusable(checkpoint_name(10))
    assert folder.names(CHECKPOINTS) == [checkpoint_name(5), checkpoint_name(10)]


def test_a_file_is_whole_by_the_manifest(folder, tmp_path):
    assert not folder.is_whole(checkpoint_name(5), SHARD)
    save(folder, 5)
    assert folder.is_whole(checkpoint_name(5), SHARD)
    shard_path(tmp_path, 5).write_bytes(b"1")
    assert not folder.is_whole(checkpoint_name(5), SHARD)
    (shard_path(tmp_path, 5).parents[1] / MANIFEST_FILE).write_text("[")
    assert not folder.is_whole(checkpoint_name(5), SHARD)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damage_falls_back_and_names_the_file(folder, tmp_path, damage):
    save(folder, 5)
    save(folder, 10)
    broken = shard_path(tmp_path, 10)
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(b"1")
    found = folder.newest_checkpoint(IDENTITY)
    assert found.manifest == manifest(5)
    got = "no such file" if damage == "missing" else "1 bytes"
    (warning,) = found.warnings
    assert warning == (
        f"{folder.uri}/checkpoints/step_00000010/{SHARD} must have 4 bytes, got {got}. "
        "An older checkpoint is used."
    )


def test_an_unreadable_manifest_falls_back(folder, tmp_path):
    save(folder, 5)
    save(folder, 10)
    (shard_path(tmp_path, 10).parents[1] / MANIFEST_FILE).write_text('{"identity": {')
    found = folder.newest_checkpoint(IDENTITY)
    assert found.name == checkpoint_name(5)
    assert MANIFEST_FILE in found.warnings[0]


def test_an_interrupted_save_is_no_checkpoint(folder):
    save(folder, 5)
    with folder.new_checkpoint(checkpoint_name(10)) as local:
        (local / "half").write_bytes(b"x")
    found = folder.newest_checkpoint(IDENTITY)
    assert (found.name, found.warnings) == (checkpoint_name(5), ())


def test_nothing_whole_means_a_fresh_start(folder, tmp_path):
    assert folder.newest_checkpoint(IDENTITY).manifest is None
    save(folder, 5)
    shard_path(tmp_path, 5).unlink()
    found = folder.newest_checkpoint(IDENTITY)
    assert found.manifest is None
    assert len(found.warnings) == 1


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("config_hash", "e" * 64, "another name"),
        ("table_key", "e" * 64, "Models do not move between SID tables"),
        ("dataset_key", "e" * 64, "another name"),
        ("zero_stage", 2, "another name"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(folder, field, value, advice):
    save(folder, 5)
    with pytest.raises(ArtifactError, match=f"{field} must be .* {advice}"):
        folder.newest_checkpoint(replace(IDENTITY, **{field: value}))


def test_small_files(folder):
    assert folder.read_json("a.json") is None
    folder.write_json([1], "a.json")
    folder.copy(["a.json"], ["deep", "b.json"])
    assert folder.read_json("deep", "b.json") == [1]
    with folder.local("deep", "b.json") as path:
        assert path.read_text() == "[1]"
    folder.delete("a.json")
    folder.delete("a.json")
    assert not folder.exists("a.json")
