"""`forge-ray gr eval` and `gr recommend`: what a trained model is worth, and its item lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

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
from forge_ray.config import load_config

ModelRef = Annotated[str, typer.Argument(help="A model: path, model/name-key, key prefix or name.")]
SidsRef = Annotated[
    str | None,
    typer.Option(help="SID table (artifact or .npz) where the store does not hold the model's."),
]
SplitName = Annotated[str | None, typer.Option(help="validation or test.")]

Output = Annotated[
    str | None, typer.Option(help="Folder or URI; default ./recommendations/<model>-<split>.")
]

_FLOORS = ("popularity", "item_knn")


def evaluate(
    model: ModelRef,
    overrides: Overrides = None,
    config: ConfigFile = None,
    split: SplitName = None,
    sids: SidsRef = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Score a model at item level beside the popularity and item-kNN floors.

    Settings: split, ks, widths, users, exclude_seen, constrained, batch_users, device.
    """
    from forge_ray.evaluate.floors import evaluate_floors
    from forge_ray.gr.scoring import EvaluationConfig, evaluate_model
    from forge_ray.gr.source import ModelSource

    values = {"split": split} if split else None
    settings = load_config(EvaluationConfig, path=config, overrides=overrides or (), values=values)
    opened = open_store(store)
    source = ModelSource.open(opened, model, sids=sids)
    metrics = evaluate_model(source, source.dataset, settings, store=opened, name=source.name)
    which: Any = settings.split
    floors = evaluate_floors(source.dataset, which, settings.ks, opened)
    boards = {source.name: metrics, **{name: floors[name] for name in _FLOORS}}
    if as_json:
        split_name = {"split": settings.split}
        rows = [{"model": name, **split_name, **found} for name, found in boards.items()]
        emit(rows, title="", as_json=True)
        return
    title = f"{source.dataset.name}, {settings.split} split, {int(metrics['users']):,} users"
    emit(_comparison(boards, settings.ks), title=title, as_json=False)


def recommend(
    model: ModelRef,
    overrides: Overrides = None,
    out: Output = None,
    config: ConfigFile = None,
    split: SplitName = None,
    sids: SidsRef = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write item lists for every user of a split as Parquet; the same command resumes.

    Settings: split, append_targets, top_k, widths, exclude_seen, batch_users, rows_per_part,
    num_actors, cpus_per_actor, use_gpu.
    """
    from forge_ray.gr.recommend import RecommendConfig
    from forge_ray.gr.recommend import recommend as write_lists
    from forge_ray.gr.source import ModelSource
    from forge_ray.launch.connect import connected

    values = {"split": split} if split else None
    settings = load_config(RecommendConfig, path=config, overrides=overrides or (), values=values)
    source = ModelSource.open(open_store(store), model, sids=sids)
    target = out or f"./recommendations/{source.name}-{settings.split}"
    stderr.print(f"lists go to {target}; the same command continues an interrupted run")
    with connected(verbose=verbose):
        report = write_lists(source, source.dataset, settings, out=target)
    emit(asdict(report), title=f"Recommendations of {source.name}", as_json=as_json)


def _comparison(
    boards: Mapping[str, Mapping[str, float]], ks: Sequence[int]
) -> list[dict[str, Any]]:
    """One line per metric, one column per model."""
    families = ("ItemHit", "ItemNDCG", "ListHit", "ListNDCG", "SidHit")
    names = [f"{family}@{k}" for family in families for k in sorted(ks)]
    middle = 10 if 10 in ks else min(ks)
    names += [f"ItemHit@{middle}/head", f"ItemHit@{middle}/tail", f"coverage@{middle}"]
    names += ["invalid_rate", "short_rate", "users", "users_per_s"]
    return [
        {"metric": name, **{board: found.get(name) for board, found in boards.items()}}
        for name in names
    ]
