"""`forge-ray gr eval` and `gr recommend`: what a trained model is worth, and its item lists."""

from __future__ import annotations

from dataclasses import asdict
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
)
from forge_ray.cli.gr_table import emit_rows, workers
from forge_ray.config import load_config

ModelRef = Annotated[str, typer.Argument(help="A model: path, model/name-key, key prefix or name.")]
SidsRef = Annotated[
    str | None,
    typer.Option(help="SID table (artifact or .npz) where the store does not hold the model's."),
]
Queries = Annotated[
    str | None,
    typer.Option("--queries", help="Query set: what its rows ask for is searched."),
]
SplitName = Annotated[str | None, typer.Option(help="validation or test.")]

ListedUsers = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="all (default): every user with all its events; train, validation or test: the rows "
        "of that split. With --queries test, train or validation.",
    ),
]

Output = Annotated[
    str | None, typer.Option(help="Folder or URI; default ./recommendations/<model>-<split>.")
]

AllowedItems = Annotated[
    str | None,
    typer.Option("--allow", help="Recommend only the item ids of this file, one a line."),
]
DeniedItems = Annotated[
    str | None, typer.Option("--deny", help="Recommend none of the item ids in this file.")
]


def evaluate(
    model: ModelRef,
    overrides: Overrides = None,
    config: ConfigFile = None,
    split: SplitName = None,
    queries: Queries = None,
    sids: SidsRef = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Score a model at item level beside the popularity and item-kNN floors.

    With --queries, on the rows of a query set: the model with and without the query, BM25 over the
    items' texts, and the floors, which read no query.

    Settings: split, ks, widths, users, exclude_seen, constrained, batch_users, device,
    tail_max_count, bootstrap, num_workers, cpus_per_worker, users_per_part. `gr compare` shows more
    models and baselines.
    """
    from forge_ray.data.queries.query_set import QuerySet
    from forge_ray.evaluate.floors import evaluate_item_knn, evaluate_popularity
    from forge_ray.evaluate.item_knn import ItemKnnConfig
    from forge_ray.gr.scoring import ModelEvaluationConfig, evaluate_model
    from forge_ray.gr.search import search_rows, title_of
    from forge_ray.gr.source import ModelSource

    values = {"split": split} if split else None
    settings = load_config(
        ModelEvaluationConfig, path=config, overrides=overrides or (), values=values
    )
    opened = open_store(store)
    source = ModelSource.open(opened, model, sids=sids)
    if queries is not None:
        asked = QuerySet.open(opened, queries)
        with workers(settings, verbose=verbose):
            search = search_rows([source], asked, settings, store=opened)
        rows = {name: row.metrics for name, row in search.items()}
        emit_rows(rows, title_of(asked), settings, as_json=as_json)
        return
    with workers(settings, verbose=verbose):
        dataset = source.dataset
        found = {
            source.name: evaluate_model(source, dataset, settings, store=opened, name=source.name),
            "popularity": evaluate_popularity(dataset, settings, opened),
            "item_knn": evaluate_item_knn(dataset, settings, ItemKnnConfig(), opened),
        }
    rows = {name: row.metrics for name, row in found.items()}
    emit_rows(rows, dataset.name, settings, as_json=as_json)


def recommend(
    model: ModelRef,
    overrides: Overrides = None,
    out: Output = None,
    config: ConfigFile = None,
    split: ListedUsers = None,
    allow: AllowedItems = None,
    deny: DeniedItems = None,
    queries: Queries = None,
    sids: SidsRef = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write an item list for every user as Parquet; the same command resumes.

    Each list follows all events that the dataset holds of the user. With --split test (validation,
    train), the rows of that split get lists instead, as if their held-out events had not happened.
    With --queries, every row of the query set's test split does, which a column `query` tells.

    Settings: split, append_targets, max_users, top_k, widths, exclude_seen, allow, deny,
    bucket_order (popularity, dense), space, batch_users, rows_per_part, num_actors, cpus_per_actor,
    use_gpu.
    """
    from forge_ray.data.queries.query_set import QuerySet
    from forge_ray.gr.recommend import RecommendConfig
    from forge_ray.gr.recommend import recommend as write_lists
    from forge_ray.gr.source import ModelSource
    from forge_ray.launch.connect import connected

    named = {"split": split, "allow": allow, "deny": deny}
    values = {name: value for name, value in named.items() if value}
    given = load_config(RecommendConfig, path=config, overrides=overrides or (), values=values)
    settings = given.completed(has_queries=queries is not None)
    source = ModelSource.open(open_store(store), model, sids=sids)
    words = [source.name, str(settings.split), *(["search"] if queries else [])]
    target = out or f"./recommendations/{'-'.join(words)}"
    stderr.print(f"lists go to {target}; the same command continues an interrupted run")
    asked = None if queries is None else QuerySet.open(open_store(store), queries)
    with connected(verbose=verbose):
        report = write_lists(source, source.dataset, settings, out=target, queries=asked)
    emit(asdict(report), title=f"Recommendations of {source.name}", as_json=as_json)
