"""The artifact store: keys, atomic publish, leases, damage, and one code path for S3."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from forge_ray import leases
from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.errors import ArtifactError
from forge_ray.leases import list_entries


@pytest.fixture(params=["local", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "local":
        return ArtifactStore(tmp_path / "store")
    endpoint = request.getfixturevalue("s3_endpoint")
    query = urllib.parse.urlencode(
        {"endpoint_override": endpoint, "scheme": "http", "allow_bucket_creation": "true"}
    )
    bucket = f"bucket-{time.time_ns()}"
    return ArtifactStore(f"s3://access:secret@{bucket}/prefix?{query}")


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


def write_numbers(writer: ArtifactWriter) -> ArtifactInfo:
    with writer.local_path("numbers.npy") as path:
        np.save(path, np.arange(5))
    with writer.open("parts", "a.txt") as stream:
        stream.write(b"part a")
    return ArtifactInfo(rows={"numbers": 5}, metrics={"mean": 2.0})


def build(store: ArtifactStore, name: str = "five", **config: int) -> Artifact:
    return store.build(
        "numbers", name, config or {"n": 5}, produce=write_numbers, command="make numbers"
    )


def test_build_publishes_files_and_manifest(any_store: ArtifactStore) -> None:
    artifact = build(any_store)
    assert np.array_equal(np.load(artifact.local("numbers.npy")), np.arange(5))
    assert [path.rsplit("/", 1)[1] for path in artifact.files("parts")] == ["a.txt"]
    manifest = any_store.open(artifact.manifest.ref).manifest
    assert manifest == artifact.manifest
    assert manifest.rows == {"numbers": 5}
    assert manifest.metrics == {"mean": 2.0}
    assert manifest.config == {"n": 5}
    assert manifest.size_bytes == sum(manifest.files.values()) > 0
    assert set(manifest.files) == {"numbers.npy", "parts/a.txt"}
    assert "numpy" in manifest.versions


def test_the_same_content_is_built_once(any_store: ArtifactStore) -> None:
    first = build(any_store)

    def refuse(writer: ArtifactWriter) -> None:
        raise AssertionError("built twice")

    again = any_store.build("numbers", "other-name", {"n": 5}, produce=refuse)
    assert again.key == first.key
    assert build(any_store, n=6).key != first.key


def test_a_failed_build_publishes_nothing_and_the_next_one_works(any_store: ArtifactStore) -> None:
    def fail(writer: ArtifactWriter) -> None:
        write_numbers(writer)
        raise RuntimeError("stage failed")

    with pytest.raises(RuntimeError, match="stage failed"):
        any_store.build("numbers", "five", {"n": 5}, produce=fail)
    assert any_store.manifests() == []
    assert build(any_store).manifest.rows == {"numbers": 5}
    assert len(any_store.manifests()) == 1


def test_a_failed_build_leaves_its_scratch_to_the_next_one(any_store: ArtifactStore) -> None:
    scratch: list[str] = []

    def half(writer: ArtifactWriter) -> None:
        scratch.append(writer.scratch)
        writer.filesystem.create_dir(writer.scratch, recursive=True)
        with writer.filesystem.open_output_stream(f"{writer.scratch}/part-0") as stream:
            stream.write(b"kept")
        raise RuntimeError("stage failed")

    def rest(writer: ArtifactWriter) -> None:
        with writer.filesystem.open_input_stream(f"{writer.scratch}/part-0") as stream:
            assert stream.read() == b"kept"
        write_numbers(writer)

    with pytest.raises(RuntimeError, match="stage failed"):
        any_store.build("numbers", "five", {"n": 5}, produce=half)
    any_store.build("numbers", "five", {"n": 5}, produce=rest)
    assert list_entries(any_store.filesystem, scratch[0]) == []


def test_remove_refuses_while_children_exist(any_store: ArtifactStore) -> None:
    parent = build(any_store)
    child = any_store.build(
        "numbers", "child", {"n": 1}, produce=write_numbers, parents=[parent.key]
    )
    with pytest.raises(ArtifactError, match="child"):
        any_store.remove(parent.key)
    any_store.remove(child.key[:12])
    any_store.remove(parent.manifest.ref)
    assert any_store.manifests() == []


def test_damage_names_the_file_and_the_command(store: ArtifactStore) -> None:
    artifact = build(store)
    Path(artifact.path("numbers.npy")).write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"numbers\.npy.*5 bytes.*make numbers"):
        store.open(artifact.manifest.ref)
    Path(artifact.path("numbers.npy")).unlink()
    with pytest.raises(ArtifactError, match=r"numbers\.npy.*none"):
        build(store)


def test_a_broken_manifest_is_named(store: ArtifactStore) -> None:
    artifact = build(store)
    Path(artifact.path("manifest.json")).write_text("{}")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        store.open(artifact.root)


def test_open_by_directory_key_name_and_nothing(store: ArtifactStore) -> None:
    artifact = build(store)
    for ref in (artifact.root, artifact.key, artifact.key[:8], "five", artifact.manifest.ref):
        assert store.open(ref).key == artifact.key
    build(store, n=7)
    with pytest.raises(ArtifactError, match="got numbers/five"):
        store.open("five")
    store.build("others", "five", {}, produce=write_numbers)
    assert store.open("five", kind="others").manifest.kind == "others"
    with pytest.raises(ArtifactError, match="got nothing"):
        store.open("absent")


def test_a_store_survives_pickling(store: ArtifactStore) -> None:
    artifact = build(store)
    assert pickle.loads(pickle.dumps(store)).open(artifact.key).key == artifact.key


def test_concurrent_builders_build_once(any_store: ArtifactStore) -> None:
    builds: list[int] = []

    def slow(writer: ArtifactWriter) -> ArtifactInfo:
        builds.append(1)
        time.sleep(0.3)
        return write_numbers(writer)

    def work(_: int) -> bool:
        return any_store.build("numbers", "five", {"n": 5}, produce=slow).is_new

    with ThreadPoolExecutor(4) as pool:
        produced = list(pool.map(work, range(4)))
    assert len(builds) == 1
    # Those that waited for it did not produce it, although it is younger than their call.
    assert sum(produced) == 1
    assert len(any_store.manifests()) == 1


def _build_forever(root: str, started: str) -> None:
    def hang(writer: ArtifactWriter) -> None:
        write_numbers(writer)
        Path(started).touch()
        time.sleep(600)

    ArtifactStore(root).build("numbers", "five", {"n": 5}, produce=hang)


def test_a_killed_builder_is_replaced_at_once(store: ArtifactStore, tmp_path: Path) -> None:
    started = tmp_path / "started"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_build_forever, args=(store.uri, str(started)))
    process.start()
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    begin = time.monotonic()
    assert build(store).manifest.rows == {"numbers": 5}
    assert time.monotonic() - begin < leases.STALE_AFTER_S / 2
    leftovers = [p.name for p in Path(store.root, "numbers").iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_a_silent_foreign_lease_is_taken_over(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "STALE_AFTER_S", 0.6)
    key = store.key("numbers", {"n": 5})
    folder = Path(store.root, ".leases", f"numbers-{key[:12]}")
    folder.mkdir(parents=True)
    (folder / "dead.ticket").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    (folder / "dead.beat").write_text("{}")
    assert build(store).manifest.rows == {"numbers": 5}
    assert not (folder / "dead.ticket").exists()


def test_two_waiters_may_remove_the_same_dead_ticket(any_store: ArtifactStore) -> None:
    folder = f"{any_store.root}/.leases/numbers"
    any_store.filesystem.create_dir(folder, recursive=True)
    for _ in range(2):
        leases.Lease(any_store.filesystem, folder)._drop("dead")


@pytest.mark.parametrize("name", ["a/b", ".hidden"])
def test_a_name_that_would_never_be_found_is_refused(store: ArtifactStore, name: str) -> None:
    with pytest.raises(ArtifactError, match="must not hold /"):
        build(store, name)


def test_a_folder_may_appear_while_it_is_listed(store: ArtifactStore) -> None:
    folder, stop = Path(store.root, "kind"), threading.Event()

    def flicker() -> None:
        while not stop.is_set():
            folder.mkdir(parents=True)
            folder.rmdir()

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        for _ in range(20_000):
            assert leases.list_entries(store.filesystem, str(folder)) == []
    finally:
        stop.set()
        thread.join()


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ArtifactError, match="pyarrow"):
        ArtifactStore("ftp://host/path")
