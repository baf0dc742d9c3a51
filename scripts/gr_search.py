"""Search with synthetic queries: a small model that reads text, beside BM25 and floors.

Usage: python scripts/record.py search_movies -- python scripts/gr_search.py movies

The queries are made from the items' titles and nobody asked them. The seed is that of SIDs and
model; the queries are the same. What the store and the run folder hold is reused. Prints JSON:
figures of every row and seed on the test queries, the model's mean and spread, and differences to
BM25 and to the model without the query, users paired.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.inputs import open_data
from forge_ray.config import load_config
from forge_ray.data.queries.build import QueriesConfig, build_queries
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.schema import Dataset
from forge_ray.evaluate.evaluator import Evaluation
from forge_ray.gr.comparison import Comparison
from forge_ray.gr.config import GrConfig
from forge_ray.gr.scoring import ModelEvaluationConfig
from forge_ray.gr.search import WITHOUT_QUERY, search_rows
from forge_ray.gr.source import ModelSource
from forge_ray.gr.train import train_generator
from forge_ray.gr.untrained import UntrainedConfig, write_untrained
from forge_ray.launch.connect import connected
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids

METRICS = ("ItemHit@10", "ItemNDCG@10")
SIDS = ["quantizer.levels=3", "quantizer.codebook_size=64", "resolver.kind=zcr"]
MODEL = [
    "model.kind=pretrained_decoder",
    "model.fresh=true",
    "model.dropout=0.1",
    "tasks.next_item=0.25",
    "tasks.search=1",
    "tasks.query_to_sid=1",
    "tasks.item_to_sid=1",
    "tasks.sid_to_text=0.1",
    "tasks.validate=search",
    "engine.global_batch=256",
    "max_history=8",
    "validation.users=300",
]
SIZE = ["num_layers=2"]


def main() -> None:
    """Makes queries, trains and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sid", nargs="*", default=[], help="settings of the SIDs")
    parser.add_argument("--size", nargs="*", default=[], help="settings of `gr untrained`")
    parser.add_argument("--gr", nargs="*", default=[], help="settings of the training")
    parser.add_argument("--store", default="./forge-store")
    parser.add_argument("--run-dir", default="./forge-runs")
    options = parser.parse_args()
    store = ArtifactStore(options.store)
    dataset = open_data(options.data, store, verbose=False)
    folder = Path(options.run_dir).resolve() / f"untrained-{dataset.key[:12]}"
    if not folder.is_dir():
        size = load_config(UntrainedConfig, overrides=[*SIZE, *options.size])
        write_untrained(dataset, folder, size)
    with connected(verbose=False):
        queries = build_queries(QueriesConfig(), dataset, store)
        models = [train(seed, options, queries, store, folder) for seed in range(options.seeds)]
        config = load_config(ModelEvaluationConfig, overrides=["split=test", "ks=[1,5,10,20,100]"])
        found = search_rows(models, queries, config, store=store)
    shared = {
        "sids": [*SIDS, *options.sid],
        "gr": [*MODEL, *options.gr],
        "size": [*SIZE, *options.size],
    }
    manifest = queries.artifact.manifest
    about = {"synthetic": queries.is_synthetic, "rows": manifest.rows, "config": manifest.config}
    rows = record(models, found)
    print(json.dumps({"settings": shared, "queries": about, **rows}, allow_nan=False))


def train(
    seed: int, options: argparse.Namespace, queries: QuerySet, store: ArtifactStore, folder: Path
) -> ModelSource:
    """The model of one seed."""
    print(f"seed {seed}", file=sys.stderr)
    dataset: Dataset = queries.dataset
    sid = load_config(SidConfig, overrides=[*SIDS, *options.sid, f"seed={seed}"])
    sids = fit_sids(sid, dataset, store)
    given = [f"model.pretrained={folder}", f"tasks.queries={queries.key}", f"seed={seed}"]
    steps = [f"max_steps={options.steps}", f"validation.every={max(1, options.steps // 2)}"]
    config = load_config(GrConfig, overrides=[*MODEL, *given, *steps, *options.gr])
    result = train_generator(
        config,
        dataset,
        sids.table,
        store=store,
        run_dir=str(Path(options.run_dir).resolve()),
        name=f"search-{queries.key[:6]}-{seed}",
    )
    return ModelSource.open(store, result.artifact.uri)


def record(models: list[ModelSource], found: dict[str, Evaluation]) -> dict[str, Any]:
    """Figures by row, in the order of seeds, and what the query adds."""
    table = Comparison(found)
    rows = {"search": [], "without_query": []}
    changes = []
    for model in models:
        without = f"{model.name} {WITHOUT_QUERY}"
        rows["search"].append(found[model.name].metrics)
        rows["without_query"].append(found[without].metrics)
        changes.append(
            {
                other: difference(table, model.name, name)
                for other, name in (("bm25", "bm25"), ("without_query", without))
            }
        )
    rows |= {name: [found[name].metrics] for name in ("bm25", "popularity", "item_knn")}
    return {"rows": rows, "spread": {name: spread(one) for name, one in rows.items()},
            "differences": changes}  # fmt: skip


def spread(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and standard deviation over seeds."""
    return {
        metric: [
            float(np.mean([row[metric] for row in rows])),
            float(np.std([row[metric] for row in rows], ddof=1)) if len(rows) > 1 else 0.0,
        ]
        for metric in METRICS
    }


def difference(table: Comparison, ours: str, theirs: str) -> dict[str, list[float]]:
    """Low and high end of the 95 % interval of our figure less theirs."""
    found = {metric: table.difference(ours, theirs, metric) for metric in METRICS}
    return {metric: [one.low, one.high] for metric, one in found.items()}


if __name__ == "__main__":
    main()
