"""`forge-ray sid`: fit semantic IDs, score them, and look at a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    ConfigFile,
    Overrides,
    StoreUri,
    Verbose,
    emit,
    open_store,
    stderr,
    working,
)
from forge_ray.cli.inputs import open_data
from forge_ray.cli.sid_extend import extend
from forge_ray.cli.sid_import import import_
from forge_ray.cli.sid_page import write_page
from forge_ray.cli.sid_score import score
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset
from forge_ray.launch.connect import connected
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.metrics.quality import symbol_quality
from forge_ray.sid.storage import SidArtifact, open_sids
from forge_ray.sid.table import SidTable
from forge_ray.threads import set_threads

app = typer.Typer(no_args_is_help=True, help="Fit, score and show semantic IDs.")
app.command()(score)
app.command()(extend)
app.command("import")(import_)

_BUCKET_EDGES = (1, 2, 3, 5, 10, 20, 50, 100)
_SHOWN_METRICS = ("seconds_fit", "seconds_encode", "seconds_resolve", "moved", "unplaced")


@app.command()
def fit(
    data: Annotated[
        str, typer.Argument(help="Prepared dataset, or a folder of raw files with vectors.")
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Fit a quantizer, encode the catalogue and resolve collisions; what exists is reused."""
    settings = load_config(SidConfig, path=config, overrides=overrides or ())
    where = open_store(store)
    set_threads(os.cpu_count() or 1)
    dataset = open_data(data, where, verbose=verbose)
    is_small = dataset.num_items <= settings.encode.local_items and not settings.train.workers
    # A small catalogue is encoded in this process; starting Ray would take longer than the work.
    with nullcontext() if is_small else connected(verbose=verbose):
        sids = _fit_with_progress(settings, dataset, where)
    emit(fit_summary(sids), title=f"SID table {sids.artifact.manifest.ref}", as_json=as_json)
    if not as_json:
        ref = sids.artifact.manifest.ref
        stderr.print(
            f"stored at {sids.artifact.uri}\nnext: forge-ray sid score {ref} --store {store}",
            soft_wrap=True,
        )


@app.command()
def show(
    ref: Annotated[str, typer.Argument(help="sids/name-key, a key prefix, a name or a directory.")],
    items: Annotated[int, typer.Option(help="Example items to print.")] = 5,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page: usage, buckets, reconstruction, the prefix tree."),
    ] = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show one SID table: sizes, lineage, bucket histogram and example items."""
    where = open_store(store)
    sids = open_sids(where, ref)
    if html is not None:
        with working(f"writing {html}"):
            write_page(html, sids, where)
        stderr.print(f"page at {html}")
    facts = {**table_facts(sids), "buckets": bucket_histogram(sids.table)}
    examples = example_items(sids, where, count=items)
    if as_json:
        emit({**facts, "examples": examples}, title="", as_json=True)
        return
    histogram = facts.pop("buckets")
    emit(facts, title=f"SID table {sids.artifact.manifest.ref}", as_json=False)
    emit(histogram, title="Items per SID", as_json=False)
    emit(examples, title="Examples", as_json=False)


def fit_summary(sids: SidArtifact) -> dict[str, Any]:
    """What `sid fit` prints: identity, quality before resolution, and where the time went."""
    raw = symbol_quality(sids.raw.codes, sids.raw.codebook_sizes).to_metrics()
    resolved = symbol_quality(sids.table.codes, sids.table.codebook_sizes).to_metrics()
    measured = {
        name: value
        for artifact in (sids.quantizer_artifact, sids.codes_artifact, sids.artifact)
        for name, value in artifact.manifest.metrics.items()
    }
    levels = range(1, sids.raw.num_levels + 1)
    return {
        **table_facts(sids),
        "uniqueness_raw": raw["uniqueness"],
        "uniqueness": resolved["uniqueness"],
        "gini": resolved["gini"],
        "max_bucket": resolved["max_bucket"],
        **{f"usage_level_{level}": raw[f"usage_level_{level}"] for level in levels},
        **{name: measured[name] for name in _SHOWN_METRICS if name in measured},
    }


def table_facts(sids: SidArtifact) -> dict[str, Any]:
    """Identity and lineage of a table."""
    return {
        "table": sids.artifact.manifest.ref,
        "items": sids.table.num_items,
        "codebook_sizes": "x".join(str(size) for size in sids.table.codebook_sizes),
        "resolver": sids.table.resolver,
        "quantizer": sids.quantizer_artifact.manifest.ref,
        "dataset": sids.artifact.manifest.parents[1][:12],
        "path": sids.artifact.uri,
    }


def bucket_histogram(table: SidTable) -> list[dict[str, Any]]:
    """How many SIDs hold 1, 2, 3–4, … items, and how many items those are."""
    keys = table.prefix_keys(table.num_levels)
    counts = np.unique(keys, return_counts=True)[1]
    rows = []
    for low, high in zip(_BUCKET_EDGES, (*_BUCKET_EDGES[1:], 2**62), strict=True):
        inside = counts[(counts >= low) & (counts < high)]
        if len(inside):
            last = min(high - 1, int(counts.max()))
            label = f"{low}" if last == low else f"{low}–{last}"
            rows.append({"items_per_sid": label, "sids": len(inside), "items": int(inside.sum())})
    return rows


def example_items(sids: SidArtifact, store: ArtifactStore, *, count: int) -> list[dict[str, Any]]:
    """The first items with their ids, codes and SID text; ids when the dataset is in the store."""
    rows = np.arange(min(count, sids.table.num_items))
    text = sids.table.text(rows)
    ids, titles = _names(store, sids.artifact.manifest.parents[1], len(rows))
    return [
        {
            "item": ids[row] if ids else row,
            "codes": " ".join(str(code) for code in sids.table.codes[row].tolist()),
            "sid": text[row],
            **({"title": titles[row]} if titles else {}),
        }
        for row in rows.tolist()
    ]


def _names(store: ArtifactStore, key: str, count: int) -> tuple[list[Any], list[Any]]:
    """Ids and titles of the first items; empty lists for what is not stored."""
    artifact = store.find("dataset", key)
    if artifact is None:
        return [], []
    table = Dataset(artifact).items().slice(0, count)
    titles = table["title"].to_pylist() if "title" in table.column_names else []
    return table["item_id"].to_pylist(), titles


def _fit_with_progress(settings: SidConfig, dataset: Dataset, store: ArtifactStore) -> SidArtifact:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(f"fitting {settings.quantizer.kind}", total=None)

        def report(step: int, metrics: Mapping[str, float]) -> None:
            losses = ", ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:3])
            progress.update(task, description=f"{settings.quantizer.kind} step {step}: {losses}")

        return fit_sids(settings, dataset, store, report=report)
