"""What choices do to generative retrieval: designs trained over seeds, in one table with baselines.

Usage: python scripts/record.py gr_beauty -- python scripts/gr_designs.py DATA best --split test
       python scripts/record.py gr_beauty_items -- python scripts/gr_designs.py DATA items

A design is a SID table and a generator; the seed is that of both. Everything runs through the
library, and what the store and the run folder hold is reused: a killed script continues. Prints
JSON: figures of every design and seed, their mean and spread, differences to the first design of
the group with users paired, and the baselines on the same users, SASRec with as many seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.inputs import open_data
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset
from forge_ray.gr.checkpoint import config_hash
from forge_ray.gr.comparison import CompareConfig, Comparison, compare, model_table
from forge_ray.gr.config import GrConfig
from forge_ray.gr.source import ModelSource
from forge_ray.gr.train import train_generator
from forge_ray.launch.connect import connected
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids

FUSED = [
    "quantizer.levels=3",
    "vectors.behaviour.alpha=0.5",
    "vectors.smooth.gamma=1",
    "resolver.kind=zcr",
]
SEMANTIC = ["quantizer.levels=3", "resolver.kind=zcr"]
ITEMS = ["model.kind=rq_transformer", "engine.global_batch=128", "max_history=50"]
CODES = ["model.kind=decoder", "engine.global_batch=64", "max_history=20", "max_steps=2000"]


@dataclass(frozen=True)
class Design:
    """Settings of one row."""

    sids: list[str]
    """Of `sid fit`."""
    gr: list[str]
    """Of `gr train`."""


SHORT = [*ITEMS, "max_steps=800"]
DESIGNS: dict[str, Design] = {
    "best": Design(FUSED, [*ITEMS, "model.dropout=0.45", "max_steps=2000"]),
    "items": Design(FUSED, SHORT),
    "items, semantic SIDs": Design(SEMANTIC, SHORT),
    "items, SIDs with collisions": Design(FUSED[:3], SHORT),
    "items, shuffled SIDs": Design(["quantizer.kind=shuffled", *FUSED], SHORT),
    "items, random SIDs": Design(["quantizer.kind=random", *FUSED], SHORT),
    "items, no prefix vectors": Design(FUSED, [*SHORT, "model.prefix_rows=0"]),
    "items, no child vectors": Design(FUSED, [*SHORT, "model.child_size=0"]),
    "items, all codes compete": Design(FUSED, [*SHORT, "model.softmax=full"]),
    "items, label smoothing .1": Design(FUSED, [*SHORT, "model.label_smoothing=0.1"]),
    "codes": Design(FUSED, CODES),
    "codes, last targets": Design(FUSED, [*CODES, "model.targets=last"]),
    "codes, all codes compete": Design(FUSED, [*CODES, "model.softmax=full"]),
    "codes, padded": Design(FUSED, [*CODES, "model.packing=false", "data.window_batches=1"]),
    "codes, discrec": Design(FUSED, [*CODES, "model.discrec=true"]),
    "encoder and decoder": Design(FUSED, [*CODES, "model.kind=t5"]),
    "parallel heads": Design(FUSED, [*ITEMS, "model.kind=parallel_heads", "max_steps=800"]),
}
GROUPS = {
    "best": ["best"],
    "items": [name for name in DESIGNS if name.startswith("items")],
    "codes": [name for name in DESIGNS if name.startswith("codes")],
    "architectures": ["items", "codes", "encoder and decoder", "parallel heads"],
}
METRICS = ("ItemHit@10", "ItemNDCG@10")


@dataclass
class Trained:
    """The models of one design."""

    sources: list[ModelSource] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    """Fits, trains and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("designs", nargs="+", help=f"names, or groups: {', '.join(GROUPS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="validation", help="test once a design is chosen")
    parser.add_argument("--baselines", action="store_true", help="rows of all baselines too")
    parser.add_argument("--sid", nargs="*", default=[], help="settings of every design's SIDs")
    parser.add_argument("--gr", nargs="*", default=[], help="settings of every design's training")
    parser.add_argument("--compare", nargs="*", default=[], help="settings of gr compare")
    parser.add_argument("--store", default="./forge-store")
    parser.add_argument("--run-dir", default="./forge-runs")
    options = parser.parse_args()
    names = list(dict.fromkeys(one for name in options.designs for one in GROUPS.get(name, [name])))
    unknown = [name for name in names if name not in DESIGNS]
    if unknown:
        parser.error(f"designs must be among {', '.join(DESIGNS)}, got {', '.join(unknown)}.")
    store = ArtifactStore(options.store)
    dataset = open_data(options.data, store, verbose=False)
    given = [f"split={options.split}", "ks=[5,10,20,100]"]
    if not options.baselines:
        given.append("baselines=[popularity,item_knn]")
    config = load_config(CompareConfig, overrides=[*given, *options.compare])
    with connected(verbose=False):
        trained = {name: train(name, options, dataset, store) for name in names}
        models = [source for one in trained.values() for source in one.sources]
        found = compare(models, dataset, config, store=store, tables=[model_table(models[0])])
        sasrec = sasrec_seeds(dataset, config, store, options.seeds)
    shared = {"sids": options.sid, "gr": options.gr, "compare": options.compare}
    rows = {**record(trained, found, options.split), **sasrec}
    print(json.dumps({"shared": shared, **rows}, allow_nan=False))


def train(
    name: str, options: argparse.Namespace, dataset: Dataset, store: ArtifactStore
) -> Trained:
    """The models of a design, one for each seed."""
    design, trained = DESIGNS[name], Trained()
    for seed in range(options.seeds):
        print(f"{name}, seed {seed}", file=sys.stderr)
        sids = fit_sids(
            load_config(SidConfig, overrides=[*design.sids, *options.sid, f"seed={seed}"]),
            dataset,
            store,
        )
        config = load_config(
            GrConfig,
            overrides=["engine.warmup_steps=100", *design.gr, *options.gr, f"seed={seed}"],
        )
        content = {"gr": config.identity(), "table": sids.artifact.key, "dataset": dataset.key}
        run = f"{''.join(c if c.isalnum() else '-' for c in name)}-{config_hash(content)[:8]}"
        result = train_generator(
            config,
            dataset,
            sids.table,
            store=store,
            run_dir=str(Path(options.run_dir).resolve()),
            name=run,
        )
        trained.sources.append(ModelSource.open(store, result.artifact.uri))
        trained.runs.append(
            {
                "seed": seed,
                "steps": result.metrics["global_step"],
                "validation": {metric: result.metrics[metric] for metric in METRICS},
                "tokens_per_s": [row["tokens_per_s"] for row in result.history],
            }
        )
    return trained


def record(trained: dict[str, Trained], found: Comparison, split: str) -> dict[str, Any]:
    """Figures by design, and of the other rows."""
    reference = next(iter(trained.values()))
    designs = {}
    for name, one in trained.items():
        rows = [found.rows[source.name].metrics for source in one.sources]
        designs[name] = {
            "sids": DESIGNS[name].sids,
            "gr": DESIGNS[name].gr,
            "runs": one.runs,
            "rows": rows,
            **summary(rows),
            "differences": [
                difference(found, ours.name, theirs.name)
                for ours, theirs in zip(one.sources, reference.sources, strict=True)
                if ours.name != theirs.name
            ],
        }
    models = {source.name for one in trained.values() for source in one.sources}
    others = {name: row.metrics for name, row in found.rows.items() if name not in models}
    return {"split": split, "cpus": os.cpu_count(), "designs": designs, "baselines": others}


def sasrec_seeds(
    dataset: Dataset, config: CompareConfig, store: ArtifactStore, seeds: int
) -> dict[str, Any]:
    """SASRec with each seed of the designs, where the table has it; seed 0 is its row."""
    if "sasrec" not in config.baselines:
        return {}
    rows = []
    for seed in range(seeds):
        print(f"sasrec, seed {seed}", file=sys.stderr)
        one = replace(config, baselines=["sasrec"], sasrec=replace(config.sasrec, seed=seed))
        rows.append(compare([], dataset, one, store=store).rows["sasrec"].metrics)
    return {"sasrec_seeds": {"rows": rows, **summary(rows)}}


def summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and spread over seeds."""
    mean = {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}
    spread = {
        metric: float(np.std([row[metric] for row in rows], ddof=1)) if len(rows) > 1 else 0.0
        for metric in METRICS
    }
    return {"mean": mean, "sd": spread}


def difference(found: Comparison, ours: str, theirs: str) -> dict[str, list[float]]:
    """Difference of two models of one seed with its 95 % interval, users paired."""
    changes = {}
    for metric in METRICS:
        bounds = found.difference(ours, theirs, metric)
        mean = found.rows[ours].metrics[metric] - found.rows[theirs].metrics[metric]
        changes[metric] = [mean, bounds.low, bounds.high]
    return changes


if __name__ == "__main__":
    main()
