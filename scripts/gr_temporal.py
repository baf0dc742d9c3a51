"""FORGE's stages, and a change of SIDs under an online model, on temporal sets: the record.

Usage: python scripts/record.py gr_stages -- python scripts/gr_temporal.py stages shop=shop-s1 …
       python scripts/record.py gr_converge -- python scripts/gr_temporal.py converge shop=shop-s1 …

A set is a name of `SETS` and any stage of its data; how they are prepared stands in
docs/convergence.md. SIDs are fitted on the first stage. Everything runs through the library, and
what the store and the run folder hold is reused: a killed script continues. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.gr_converge import record
from forge_ray.config import load_config
from forge_ray.data.chain import stage_chain
from forge_ray.data.schema import Dataset
from forge_ray.gr.converge import ConvergeConfig, converge
from forge_ray.gr.stages import SidVariant, StagesConfig, run_stages
from forge_ray.launch.connect import connected
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids

NUM_STAGES = 3
TRAIN = [
    "model.kind=rq_transformer",
    "model.hidden_size=64",
    "model.num_layers=1",
    "engine.global_batch=64",
    "engine.warmup_steps=10",
    "engine.schedule=constant",
    "max_history=30",
    "validation.users=500",
    "validation.ks=[10,20,100]",
    "published=last",
    "in_process=true",
]
SIDS = ["quantizer.levels=3", "quantizer.codebook_size=64", "resolver.kind=zcr"]


ROWS = "train.validation.users=1000"
MANY = [ROWS, "evaluate.users=2000"]
"""For a set whose every held-out event is a row (`split.targets=each`)."""


@dataclass(frozen=True)
class Set:
    """What differs between the sets."""

    sids: list[str]
    train: list[str]
    converge: list[str]
    stages: list[str]


SETS = {
    "shop": Set(
        sids=[],
        train=["model.prefix_rows=4096"],
        converge=[
            "metric=HR@20",
            "old_steps=300",
            "offline_steps=150",
            "train.max_steps=150",
            "train.validation.every=15",
        ],
        stages=["train.max_steps=150", "train.validation.every=150"],
    ),
    "movies": Set(
        sids=["vectors.space=minilm"],
        train=["model.prefix_rows=16384"],
        converge=[
            "metric=HR@100",
            "old_steps=150",
            "offline_steps=100",
            "train.max_steps=100",
            "train.validation.every=10",
            ROWS,
        ],
        stages=["train.max_steps=150", "train.validation.every=150", *MANY],
    ),
}
SETS["movies_short"] = replace(
    SETS["movies"], stages=["train.max_steps=40", "train.validation.every=40", *MANY]
)


def main() -> None:
    """Fits, trains and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["stages", "converge"])
    parser.add_argument("sets", nargs="+", help=f"name=stage, name of {', '.join(SETS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="more", nargs="*", default=[], help="settings of all sets")
    parser.add_argument("--store", default="./forge-store")
    parser.add_argument("--run-dir", default="./forge-runs")
    options = parser.parse_args()
    measure = measure_stages if options.what == "stages" else measure_converge
    found = {}
    with connected(verbose=False):
        for word in options.sets:
            name, _, data = word.partition("=")
            began = time.process_time()
            found[name] = measure(name, data, options)
            found[name]["cpu_seconds"] = round(time.process_time() - began, 1)
    print(json.dumps(found, allow_nan=False))


def table(name: str, first: Dataset, store: ArtifactStore, *, seed: int, label: str) -> SidVariant:
    """SIDs of one set; two seeds are two tables of equal quality."""
    config = load_config(SidConfig, overrides=[*SIDS, *SETS[name].sids, f"seed={seed}"])
    fitted = fit_sids(config, first, store)
    return SidVariant(f"{name}-{label}", fitted.artifact, first)


def prefixed(settings: Sequence[str]) -> list[str]:
    """Settings of `gr train` inside those of a chain."""
    return [f"train.{one}" for one in settings]


def measure_converge(name: str, data: str, options: argparse.Namespace) -> dict[str, Any]:
    """All starts of one set."""
    store = ArtifactStore(options.store)
    stages = stage_chain(store, data)
    given = [
        *prefixed([*TRAIN, *SETS[name].train]),
        "rollout=3",
        f"seeds={list(range(options.seeds))}",
    ]
    config = load_config(ConvergeConfig, overrides=[*given, *SETS[name].converge, *options.more])
    found = converge(
        stages,
        table(name, stages[0], store, seed=0, label="a"),
        table(name, stages[0], store, seed=1, label="b"),
        config,
        store=store,
        run_dir=str(Path(options.run_dir).resolve()),
        tell=lambda arm, seed, one: print(name, arm, seed, one, file=sys.stderr),
    )
    return {"stages": sizes(stages), **record(found, config)}


def measure_stages(name: str, data: str, options: argparse.Namespace) -> dict[str, Any]:
    """The first stages of one set, continued beside scratch, for every seed."""
    store = ArtifactStore(options.store)
    stages = stage_chain(store, data)[:NUM_STAGES]
    sids = table(name, stages[0], store, seed=0, label="a")
    rows = []
    for seed in range(options.seeds):
        given = [
            *prefixed([*TRAIN, *SETS[name].train, f"seed={seed}"]),
            "evaluate.split=validation",
        ]
        config = load_config(StagesConfig, overrides=[*given, *SETS[name].stages, *options.more])
        for row in run_stages(
            stages,
            [sids],
            config,
            store=store,
            run_dir=str(Path(options.run_dir).resolve()),
            tell=lambda row: print(name, row.stage, row.training, row.metrics, file=sys.stderr),
        ):
            figures = {k: v for k, v in row.metrics.items() if k.startswith("HR@") and "/" not in k}
            kept = {k: v for k, v in figures.items() if not k.endswith(("_low", "_high"))}
            rows.append(
                {
                    "stage": row.stage,
                    "training": row.training,
                    "seed": seed,
                    "steps": row.steps,
                    "users": int(row.metrics["users"]),
                    **kept,
                }
            )
    return {"stages": sizes(stages), "settings": SETS[name].stages, "rows": rows}


def sizes(stages: Sequence[Dataset]) -> list[dict[str, int]]:
    """Rows of every stage's dataset."""
    return [dict(stage.artifact.manifest.rows) for stage in stages]


if __name__ == "__main__":
    main()
