"""Real storage that fails under a real sweep: a disk fills up, an object store is away."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.sweep.ledger import Ledger
from tests.e2e.faults import RUN, TinySweep, check_trials, results, trains
from tests.gr.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MOUNT = "unshare --map-root-user --mount"
# A disk of its own, which the end of the shell takes away; what is to be looked at is copied out.
ON_A_SMALL_DISK = """
set -u
mkdir -p disk && mount -t tmpfs -o size={small} none disk || exit 77
{run}; first=$?
cp -r disk/store/sweeps before
mount -o remount,size=500m disk
{run}; second=$?
cp -r disk/store/sweeps after
echo "exit codes $first $second"
"""


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, undisturbed: TinySweep) -> None:
    if shutil.which("unshare") is None or _in_namespace("mount -t tmpfs none /mnt", tmp_path):
        pytest.skip("a mount namespace needs unshare and a kernel that lets users have one")
    sweep = TinySweep.make(tmp_path)
    words = [sys.executable, "-c", f'"{RUN}"', "sweep", "run", str(sweep.folder / "sweep.yaml")]
    run = " ".join([*words, "--store", "disk/store"])
    script = ON_A_SMALL_DISK.format(small="3m", run=run)
    done = subprocess.run(
        [*MOUNT.split(), "sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "exit codes 2 0" in said, said
    assert "must have free space" in said
    before, after = (Ledger(tmp_path / name / "tiny").read() for name in ("before", "after"))
    check_trials(after, undisturbed.ledger.read())
    # What had ended on the small disk stayed as it was.
    ended = {key: end for key, end in results(before).items() if before.trials[key].is_finished}
    assert {key: results(after)[key] for key in ended} == ended


def _in_namespace(command: str, folder: Path) -> int:
    words = [*MOUNT.split(), "sh", "-c", command]
    return subprocess.run(words, cwd=folder, capture_output=True, check=False).returncode


def test_an_object_store_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, undisturbed: TinySweep
) -> None:
    with _s3() as s3:
        query = {
            "endpoint_override": s3.endpoint,
            "scheme": "http",
            "allow_bucket_creation": "true",
        }
        uri = f"s3://reader:hunter2@shop/store?{urllib.parse.urlencode(query)}"
        sweep = TinySweep.make(tmp_path)
        driver = sweep.start(f"folder={sweep.ledger.folder}", store=uri)
        sweep.wait(driver, trains, "a training")
        s3.close()
        # Longer than the client's own tries; the final evaluation or a next fit needs the store.
        silence = "the driver never noticed"
        wait_until(lambda: "storage does not answer" in sweep.said(driver), silence, 300)
        s3.open()
        output = sweep.finish(driver)
        check_trials(sweep.ledger.read(), undisturbed.ledger.read())
        models = ArtifactStore(uri).manifests("model")
        assert sorted(one.key for one in models) == undisturbed.models()
        # The credentials of the store are in no file that people share, nor in the output.
        shared = [path for path in sweep.ledger.folder.rglob("*") if path.is_file()]
        assert not [path for path in shared if b"hunter2" in path.read_bytes()]
        assert "hunter2" not in output


class _Proxy:
    """Forwards TCP connections to a server; closed, it refuses new ones and cuts the others."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._open = True
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._open = False
        for one in self._pairs:
            one.close()
        self._pairs.clear()

    def open(self) -> None:
        self._open = True

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if not self._open:
                client.close()
                continue
            server = socket.create_connection(self._target)
            self._pairs += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, target), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass  # cut on purpose, or by the other side
    finally:
        source.close()
        target.close()


@contextmanager
def _s3() -> Iterator[_Proxy]:
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        yield _Proxy(server.get_host_and_port())
    finally:
        server.stop()
