"""`forge-ray gr compare`: models and baselines in one table, through one evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    ConfigFile,
    StoreUri,
    Verbose,
    emit,
    open_store,
)
from forge_ray.cli.gr_table import emit_rows, middle_cut, workers
from forge_ray.cli.inputs import open_data
from forge_ray.config import load_config
from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from forge_ray.data.schema import Dataset
    from forge_ray.gr.comparison import Comparison, NamedTable
    from forge_ray.gr.source import ModelSource

Words = Annotated[
    list[str] | None,
    typer.Argument(help="Models (path, model/name-key, key prefix or name) and key=value items."),
]
DataRef = Annotated[
    str | None,
    typer.Option("--data", help="Dataset, or a folder of raw files; models know theirs."),
]
TableRefs = Annotated[
    list[str] | None,
    typer.Option("--sids", help="More SID tables for markov_backoff rows; may be repeated."),
]
SplitName = Annotated[str | None, typer.Option(help="validation or test.")]
Against = Annotated[
    str | None, typer.Option(help="Row that the others are compared with, user by user.")
]


def compare(
    words: Words = None,
    data: DataRef = None,
    sids: TableRefs = None,
    against: Against = None,
    config: ConfigFile = None,
    split: SplitName = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Put models, baselines and floors into one table, on the same users.

    Settings: those of `gr eval`, baselines (a list of rows) and the sections item_knn,
    markov_backoff and sasrec. Rows that the store holds are not computed again.
    """
    from forge_ray.gr.comparison import CompareConfig, compare
    from forge_ray.gr.source import ModelSource, own_table

    given = words or []
    overrides = [word for word in given if "=" in word]
    values = {"split": split} if split else None
    settings = load_config(CompareConfig, path=config, overrides=overrides, values=values)
    opened = open_store(store)
    names = [word for word in given if "=" not in word]
    models = [
        ModelSource.open(opened, name, sids=own_table(opened, name, sids or [])) for name in names
    ]
    dataset = _dataset(data, models, opened, verbose=verbose)
    tables = _tables(models, sids or [], dataset, opened)
    with workers(settings, verbose=verbose):
        found = compare(models, dataset, settings, store=opened, tables=tables, against=against)
    boards = {name: row.metrics for name, row in found.rows.items()}
    if not boards:
        raise ConfigError("a comparison must have a row, got none. Name a model or a baseline.")
    changes = [] if against is None else _differences(found, against, middle_cut(settings.ks))
    if as_json and changes:
        rows = [{"model": name, "split": settings.split, **row} for name, row in boards.items()]
        emit({"rows": rows, "against": against, "differences": changes}, title="", as_json=True)
        return
    emit_rows(boards, dataset.name, settings, as_json=as_json)
    if changes:
        emit(changes, title=f"Difference to {against}, users paired", as_json=False)


def _dataset(
    data: str | None, models: Sequence[ModelSource], store: ArtifactStore, *, verbose: bool
) -> Dataset:
    if data is not None:
        return open_data(data, store, verbose=verbose)
    if not models:
        raise ConfigError(
            "--data must name a dataset where no model does, got nothing. Add --data or a model."
        )
    return models[0].dataset


def _tables(
    models: Sequence[ModelSource], sids: Sequence[str], dataset: Dataset, store: ArtifactStore
) -> list[NamedTable]:
    """The tables of the models and those asked for, each once."""
    from forge_ray.gr.comparison import model_table, named_table

    found = [model_table(model) for model in models]
    found += [named_table(ref, dataset, store) for ref in sids]
    return list({table.key: table for table in found}.values())


def _differences(found: Comparison, against: str, cut: int) -> list[dict[str, Any]]:
    """Row less reference, with its 95 % interval; decided where the interval leaves out 0."""
    records = []
    for row in found.rows:
        if row == against:
            continue
        for metric in (f"ItemHit@{cut}", f"ItemNDCG@{cut}"):
            bounds = found.difference(row, against, metric)
            records.append(
                {
                    "model": row,
                    "metric": metric,
                    "difference": found.rows[row].metrics[metric]
                    - found.rows[against].metrics[metric],
                    "low": bounds.low,
                    "high": bounds.high,
                    "is_decided": bounds.low > 0 or bounds.high < 0,
                }
            )
    return records
