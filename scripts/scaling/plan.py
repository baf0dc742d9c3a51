"""The commands of one size of the scale run, and how their stages are told apart from outside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scaling.watching import Stage

PYTHON = sys.executable
CLI = [PYTHON, "-m", "forge_ray"]
DATASET, MODEL = "scale-data", "scale-model"
DIM, EVENTS = 64, 15.8
"""Width of the vectors; interactions of a user of this generator once repeats are taken out."""
SIDS = ["quantizer.levels=3", "quantizer.codebook_size=1024", "resolver.kind=knn_cap"]
STEPS, BATCH, USERS = 40, 256, 100_000
DECODER = ["model.hidden_size=64", "model.num_layers=2", "model.intermediate_size=128"]
LISTS = ["top_k=10", "widths=[10,10,10]", "batch_users=64"]


@dataclass(frozen=True)
class Size:
    """One problem size."""

    items: int
    interactions: int

    @property
    def name(self) -> str:
        """Folder of this size."""
        return f"{self.items}x{self.interactions}"

    @property
    def users(self) -> int:
        """Users that give about that many interactions."""
        return max(1, round(self.interactions / EVENTS))


Command = tuple[list[str], list[Stage]]


def plan(folder: Path, size: Size, window: int) -> Iterator[Command]:
    """Commands in order, each with its stages.

    Args:
        folder: of this size.
        size: how large.
        window: places within which `prepare` counts pairs; 0 counts none.
    """
    yield _synthesize(folder, size)
    yield _prepare(folder, size, window)
    yield _fit(folder, size)
    yield from _use(folder, size)


def _synthesize(folder: Path, size: Size) -> Command:
    raw = folder / "raw"
    branch = 32 if size.items >= 500_000 else 8
    words = [f"num_items={size.items}", f"num_users={size.users}", f"vector_dim={DIM}"]
    words += ["mean_events=20", "max_events=40", f"branching=[{branch},{branch},{branch}]"]
    words += ["users_per_shard=50000", "items_per_shard=250000"]
    done = _seen(raw, "synthetic.yaml")
    at_work = _seen(raw, "vectors/*.parquet")
    stage = Stage("synthesize", size.interactions, "interactions", done, at_work)
    return [*CLI, "data", "synthesize", str(raw), *words], [stage]


def _prepare(folder: Path, size: Size, window: int) -> Command:
    store = folder / "store"
    words = [str(folder / "raw"), f"name={DATASET}", f"pairs.window={window}"]
    logged = _published(store, "log")
    stages = [
        Stage("index_and_order", size.interactions, "interactions", logged, _seen(store, "log/*")),
        Stage("cut", size.interactions, "interactions", _published(store, "dataset"), logged),
    ]
    return [*CLI, "data", "prepare", *words, "--store", str(store)], stages


def _fit(folder: Path, size: Size) -> Command:
    store = folder / "store"
    quantizer, codes = _published(store, "quantizer"), _published(store, "codes")
    stages = [
        Stage("fit", size.items, "items", quantizer, _seen(store, "quantizer/.staging*")),
        Stage("encode", size.items, "items", codes, _seen(store, ".scratch/codes-*/*.npz", 3)),
        Stage("resolve", size.items, "items", _published(store, "sids"), codes),
    ]
    return [*CLI, "sid", "fit", DATASET, *SIDS, "--store", str(store)], stages


def _use(folder: Path, size: Size) -> Iterator[Command]:
    store, sids = folder / "store", "rq_kmeans-3x1024-knn_cap"
    where = ["--store", str(store)]
    scored, trained = _published(store, "scores"), _published(store, "model")
    yield (
        [*CLI, "sid", "score", sids, *where],
        [Stage("score", size.items, "items", scored, _seen(store, ".leases/scores*"))],
    )
    runs = folder / "runs"
    words = [*DECODER, f"max_steps={STEPS}", f"engine.global_batch={BATCH}", "validation.users=64"]
    words += [f"validation.every={STEPS}", "--name", MODEL, "--run-dir", str(runs)]
    yield (
        [*CLI, "gr", "train", sids, *words, *where],
        [Stage("train", STEPS * BATCH, "rows", trained, _seen(runs, f"{MODEL}/forge-run.json"))],
    )
    out = folder / "lists"
    users = min(USERS, size.users)
    words = [*LISTS, f"max_users={users}", "rows_per_part=5000"]
    words += ["--split", "test", "--out", str(out)]
    done = _seen(out, "summary.json")
    yield (
        [*CLI, "gr", "recommend", MODEL, *words, *where],
        [Stage("recommend", users, "users", done, _seen(out, "lists/part-*"))],
    )


def _published(store: Path, kind: str) -> Callable[[], bool]:
    return _seen(store, f"{kind}/*/manifest.json")


def _seen(folder: Path, pattern: str, count: int = 1) -> Callable[[], bool]:
    return lambda: len(list(folder.glob(pattern))) >= count


def measured(folder: Path) -> dict[str, object]:
    """What the finished stages counted of themselves, from their manifests and reports."""
    wanted = {
        "rows": ("dataset", "rows", ("items", "users", "interactions", "pairs")),
        "fit": ("quantizer", "metrics", ("seconds_fit",)),
        "encode": ("codes", "metrics", ("seconds_encode",)),
        "resolve": ("sids", "metrics", ("moved",)),
        "train": ("model", "metrics", ("tokens_per_s", "input_wait_share")),
    }
    found: dict[str, object] = {}
    for name, (kind, part, keys) in wanted.items():
        for path in (folder / "store").glob(f"{kind}/*/manifest.json"):
            values = json.loads(path.read_text())[part]
            found[name] = {key: values[key] for key in keys}
    summary = folder / "lists/summary.json"
    if summary.exists():
        lists = json.loads(summary.read_text())
        found["recommend"] = {key: lists[key] for key in ("users", "users_per_s", "invalid_rate")}
    return found
