"""Raw files and the store on object storage go through the same code."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from forge_ray.artifacts import ArtifactStore, open_filesystem
from forge_ray.data.prepare import open_or_prepare
from tests.data.raw import write_raw

pytestmark = pytest.mark.ray


@pytest.fixture
def bucket() -> Iterator[str]:
    """URI of an empty folder on a local S3 server, with a place for the folder's name."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    query = urllib.parse.urlencode(
        {"endpoint_override": f"{host}:{port}", "scheme": "http", "allow_bucket_creation": "true"}
    )
    yield f"s3://access:secret@data/{{}}?{query}"
    server.stop()


def test_prepare_on_object_storage(ray_local: None, tmp_path: Path, bucket: str) -> None:
    raw = write_raw(tmp_path / "raw")
    remote, path = open_filesystem(bucket.format("raw"))
    remote.create_dir(path)
    pafs.copy_files(str(raw), path, destination_filesystem=remote)
    dataset = open_or_prepare(bucket.format("raw"), ArtifactStore(bucket.format("store")))
    local = open_or_prepare(raw, ArtifactStore(tmp_path / "store"))
    assert dataset.key == local.key
    sizes = local.artifact.manifest.files
    assert {n: s for n, s in dataset.artifact.manifest.files.items() if n != "prepare.yaml"} == {
        n: s for n, s in sizes.items() if n != "prepare.yaml"
    }
    assert dataset.vectors().tolist() == local.vectors().tolist()
