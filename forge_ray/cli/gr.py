"""`forge-ray gr`: train, evaluate and use generative-retrieval models."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    Overrides,
    StoreUri,
    Verbose,
    emit,
    open_store,
    stderr,
    working,
)
from forge_ray.cli.gr_compare import compare
from forge_ray.cli.gr_converge import converge
from forge_ray.cli.gr_decode import evaluate, recommend
from forge_ray.cli.gr_stages import stages
from forge_ray.cli.gr_untrained import untrained
from forge_ray.cli.inputs import open_data
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.gr.recipes import recipe_names, recipe_path
from forge_ray.sid.storage import fitted_dataset, load_table, table_source
from forge_ray.sid.table import SidTable

app = typer.Typer(no_args_is_help=True, help="Train, evaluate and use generative retrieval.")
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("recommend")(recommend)
app.command("stages")(stages)
app.command("untrained")(untrained)
app.command("converge")(converge)

SidsRef = Annotated[str, typer.Argument(help="SID table: a stored one, or an .npz file.")]
DataRef = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Dataset of an .npz table, or a folder of raw files. Stored tables know theirs; "
        "another stage of its log may be named.",
    ),
]
RunName = Annotated[
    str | None,
    typer.Option(
        "--name", help="Name of the run; the same name resumes. Default: from the content."
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help=f"YAML file, or a recipe by name: {', '.join(recipe_names())}."
    ),
]
RunDir = Annotated[
    str, typer.Option("--run-dir", help="Where checkpoints go: a path or URI all nodes share.")
]
_CHOSEN = {
    "best": "best model (by validation ItemNDCG@10)",
    "last": "model with the last weights",
}
_SHOWN = ("global_step", "epoch", "loss", "ItemHit@10", "ItemNDCG@10", "tokens_per_s")


@app.command("train")
def train(
    sids: SidsRef,
    overrides: Overrides = None,
    data: DataRef = None,
    config: Recipe = None,
    name: RunName = None,
    run_dir: RunDir = "./forge-runs",
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train a generator on a SID table and publish the best checkpoint, or the last one.

    Interrupted by anything, the same command continues from the last checkpoint.
    """
    from forge_ray.gr.checkpoint import config_hash, table_key
    from forge_ray.gr.config import GrConfig
    from forge_ray.gr.train import train_generator
    from forge_ray.launch.connect import connected

    path = config and recipe_path(config)
    settings = load_config(GrConfig, path=path, overrides=overrides or ())
    where = open_store(store)
    folder = run_dir if "://" in run_dir else str(Path(run_dir).resolve())
    with connected(verbose=verbose):
        dataset, table = _open_inputs(sids, data, where, verbose=verbose)
        content = {"gr": settings.identity(), "table": table_key(table), "dataset": dataset.key}
        digest = config_hash(content)
        run = name or f"{settings.model.kind}-{digest[:8]}"
        stderr.print(
            f"checkpoints go to {folder}/{run}; the same command resumes an interrupted run"
        )
        with working(f"training {run}"), _following(Path(folder, run), quiet=as_json):
            result = train_generator(
                settings,
                dataset,
                table,
                store=where,
                run_dir=folder,
                name=run,
                command=_command(
                    sids,
                    overrides or (),
                    {
                        "--data": data,
                        "--config": config,
                        "--name": run,
                        "--run-dir": run_dir,
                        "--store": store,
                    },
                ),
            )
    if as_json:
        record = {"model": result.artifact.uri, "metrics": result.metrics}
        emit({**record, "history": result.history}, title="", as_json=True)
        return
    emit([_shown(row) for row in result.history], title=f"Training of {run}", as_json=False)
    stderr.print(f"{_CHOSEN[settings.published]}: {result.artifact.uri}", soft_wrap=True)


def _command(sids: str, overrides: Sequence[str], options: Mapping[str, str | Path | None]) -> str:
    """The shell command that repeats the run, for the manifest; empty options are left out."""
    given = [word for name, value in options.items() if value for word in (name, str(value))]
    return shlex.join(["forge-ray", "gr", "train", sids, *overrides, *given])


def _open_inputs(
    sids: str, data: str | None, store: ArtifactStore, *, verbose: bool
) -> tuple[Dataset, SidTable]:
    if data is not None:
        dataset = open_data(data, store, verbose=verbose)
    elif sids.endswith(".npz"):
        raise ConfigError(
            f"--data must name the dataset of {sids}, got nothing. "
            "Add --data with a prepared dataset or a folder of raw files."
        )
    else:
        dataset = fitted_dataset(store, sids)
    return dataset, load_table(table_source(store, sids, dataset), dataset)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _SHOWN if name in row}


@contextmanager
def _following(run: Path, *, quiet: bool) -> Iterator[None]:
    """Prints one line per validation, read from a local folder of the run."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, stop), daemon=True)
    if not quiet:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if not quiet:
            thread.join()


def _follow(run: Path, stop: threading.Event) -> None:
    told = {row["global_step"] for row in _rows(run)}
    while not stop.wait(0.5):
        for row in _rows(run):
            if row["global_step"] in told:
                continue
            told.add(row["global_step"])
            figure = row["ItemNDCG@10"]
            shown = "not measured" if figure is None else f"{figure:.4f}"
            stderr.print(
                f"step {row['global_step']:,}  loss {row['loss']:.3f}  "
                f"ItemNDCG@10 {shown}  {row['tokens_per_s']:,.0f} tokens/s",
                highlight=False,
            )


def _rows(run: Path) -> list[dict[str, Any]]:
    """Validations of a run so far; none where its folder is not on this machine."""
    try:
        rows: list[dict[str, Any]] = json.loads((run / "history.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return rows
