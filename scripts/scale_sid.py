"""SIDs for a large synthetic catalogue through the command line: time and memory of each stage.

Usage: python scripts/scale_sid.py FOLDER [--items 10000000] [--kill]      prints JSON

With --kill the commands are killed with SIGKILL, whole process tree, at work in each stage; the
same command then continues. Memory is the peak sum of the proportional set sizes of a command and
all its children, so that shared pages count once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

CLI = str(Path(sys.executable).with_name("forge-ray"))
DESIGN = ["quantizer.levels=3", "quantizer.codebook_size=1024", "resolver.kind=knn_cap"]
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Stage:
    """A part of a command, told by what the store shows from outside."""

    name: str
    is_at_work: Callable[[], bool]
    """When a killer may strike."""
    is_done: Callable[[], bool]


@dataclass
class Watch:
    """What was seen of each stage while its command ran."""

    peak_bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)


def main() -> None:
    """Runs every command to its end and prints one row for each stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    watch = Watch()
    for command, stages in plan(options.folder.resolve(), options.items):
        if all(stage.is_done() for stage in stages):  # by an earlier run of this script
            continue
        targets = [stage.name for stage in stages] if options.kill else []
        while not run(command, stages, watch, targets):
            print(f"killed in {watch.killed[-1]}; the same command again", file=sys.stderr)
    rows = [
        {
            "stage": name,
            "seconds": round(seconds, 1),
            "items_per_s": round(options.items / seconds),
            "peak_gib": round(watch.peak_bytes[name] / 2**30, 2),
            "killed": name in watch.killed,
        }
        for name, seconds in watch.seconds.items()
    ]
    metrics = stored_metrics(options.folder.resolve() / "store")
    print(json.dumps({"items": options.items, "design": DESIGN, "stages": rows, **metrics}))


def plan(folder: Path, items: int) -> Iterator[tuple[list[str], list[Stage]]]:
    """Commands in order, each with its stages."""
    raw, store = folder / "raw", folder / "store"
    os.environ["FORGE_RAY_STORE"] = str(store)
    size = [f"num_items={items}", f"num_users={items // 10}", "vector_dim=64", "mean_events=10"]
    shards = ["branching=[32,32,32]", "users_per_shard=50000", "items_per_shard=250000"]

    def published(kind: str) -> Callable[[], bool]:
        return lambda: any(store.glob(f"{kind}/*/manifest.json"))

    def seen(pattern: str, count: int = 1) -> Callable[[], bool]:
        return lambda: len(list(folder.glob(pattern))) >= count

    finished = seen("raw/synthetic.yaml")
    yield (
        [CLI, "data", "synthesize", str(raw), *size, *shards],
        [Stage("synthesize", seen("raw/vectors/*.parquet", 3), finished)],
    )
    yield (
        [CLI, "data", "prepare", str(raw)],
        [Stage("prepare", published("log"), published("dataset"))],
    )
    yield (
        [CLI, "sid", "fit", str(raw), *DESIGN],
        [
            Stage("fit", seen("store/quantizer/.staging*"), published("quantizer")),
            Stage("encode", seen("store/.scratch/codes-*/*.npz", 3), published("codes")),
            Stage("resolve", seen("store/sids/.staging*"), published("sids")),
        ],
    )
    yield (
        [CLI, "sid", "score", "rq_kmeans-3x1024-knn_cap", "--json"],
        [Stage("score", seen("store/.leases/scores*"), published("scores"))],
    )


def run(command: list[str], stages: list[Stage], watch: Watch, targets: list[str]) -> bool:
    """Runs a command once, killing it in the first target not yet killed; False when killed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    looked = time.monotonic()
    try:
        while process.poll() is None:
            now = next((stage for stage in stages if not stage.is_done()), stages[-1])
            passed, looked = time.monotonic() - looked, time.monotonic()
            watch.seconds[now.name] = watch.seconds.get(now.name, 0.0) + passed
            held = tree_bytes(process.pid)
            watch.peak_bytes[now.name] = max(watch.peak_bytes.get(now.name, 0), held)
            if now.name in targets and now.name not in watch.killed and now.is_at_work():
                watch.killed.append(now.name)
                kill_tree(process)
                return False
            time.sleep(LOOK_EVERY_S)
    finally:
        if process.poll() is None:
            kill_tree(process)
    if process.returncode:
        sys.exit(f"{command} must succeed, got exit code {process.returncode}.")
    return True


def tree_bytes(pid: int) -> int:
    """Proportional set size of a process and all its children."""
    total = 0
    for one in family(pid):
        with contextlib.suppress(psutil.Error):  # it ended between listing and looking
            total += one.memory_full_info().pss
    return total


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the command and everything it started."""
    for one in family(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait()


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants; empty when it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def stored_metrics(store: Path) -> dict[str, object]:
    """What the stages measured of themselves, from their manifests."""
    wanted = ("quantizer", "codes", "sids", "scores")
    manifests = {kind: next(store.glob(f"{kind}/rq_kmeans*/manifest.json")) for kind in wanted}
    found = {kind: json.loads(path.read_text())["metrics"] for kind, path in manifests.items()}
    found["quantizer"].pop("loss_curve", None)
    return found


if __name__ == "__main__":
    main()
