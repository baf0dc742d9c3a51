"""`forge-ray data queries`: what users asked for, from a log or made from the items' texts."""

from __future__ import annotations

from typing import Annotated

import typer

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
from forge_ray.config import load_config
from forge_ray.data.queries.build import QueriesConfig, build_queries
from forge_ray.data.schema import Dataset
from forge_ray.launch.connect import connected


def queries(
    dataset: Annotated[str, typer.Argument(help="A prepared dataset.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Make a query set: queries next to histories and the item that was wanted, by split.

    From a log: forge-ray data queries shop log.path=queries.csv log.query=text

    Without one, synthetic ones from the items' titles: forge-ray data queries movies
    """
    loaded = load_config(QueriesConfig, path=config, overrides=overrides or ())
    where = open_store(store)
    opened = Dataset.open(where, dataset)
    with connected(verbose=verbose), working("collecting queries"):
        found = build_queries(loaded, opened, where)
    manifest = found.artifact.manifest
    source = "synthetic, made from the items' texts" if found.is_synthetic else "from a log"
    row = {"queries": manifest.ref, "source": source, **manifest.rows, "at": found.artifact.uri}
    emit(row, title=manifest.ref, as_json=as_json)
    for cause, example in manifest.metrics["examples"].items():
        stderr.print(f"{cause}: {example}", highlight=False, soft_wrap=True)
