"""`forge-ray embed`: make a vector space of a dataset's texts or images."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from forge_ray.artifacts import Artifact, ArtifactStore
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
from forge_ray.cli.inputs import open_data
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset
from forge_ray.embed.encoders import EncoderConfig, ImageConfig, TextConfig
from forge_ray.embed.encoders.stage import encode_items
from forge_ray.embed.vectors import open_space
from forge_ray.launch.connect import connected

app = typer.Typer(no_args_is_help=True, help="Make vector spaces of texts and images.")

Data = Annotated[str, typer.Argument(help="Prepared dataset, or a folder of raw files.")]
Model = Annotated[
    str | None, typer.Option(help="Folder of a model, or its name on the Hugging Face hub.")
]
Columns = Annotated[str | None, typer.Option(help="Columns of the items, joined by commas.")]
Name = Annotated[str | None, typer.Option(help="Name of the space; `vectors.space` takes it.")]


@app.command()
def text(
    data: Data,
    overrides: Overrides = None,
    model: Model = None,
    columns: Columns = None,
    name: Name = None,
    config: ConfigFile = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Encode the items' texts with a sentence-transformers or other text model; resumes."""
    given = _options(model=model, columns=columns, name=name)
    settings = load_config(TextConfig, path=config, values=given, overrides=overrides or ())
    _encode(settings, data, store, as_json=as_json, verbose=verbose)


@app.command()
def image(
    data: Data,
    overrides: Overrides = None,
    model: Model = None,
    columns: Columns = None,
    name: Name = None,
    config: ConfigFile = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Encode the items' images with a CLIP or other vision model; resumes."""
    given = _options(model=model, columns=columns, name=name)
    settings = load_config(ImageConfig, path=config, values=given, overrides=overrides or ())
    _encode(settings, data, store, as_json=as_json, verbose=verbose)


def _options(*, model: str | None, columns: str | None, name: str | None) -> dict[str, Any]:
    """The options that were given, as configuration."""
    listed = None if columns is None else [one.strip() for one in columns.split(",")]
    given = {"model": model, "columns": listed, "name": name}
    return {key: value for key, value in given.items() if value is not None}


def _encode(
    settings: EncoderConfig, data: str, store: str, *, as_json: bool, verbose: bool
) -> None:
    where = open_store(store)
    if not verbose:
        # Loading a model draws a bar of its own into ours.
        disable_progress_bar()
    with connected(verbose=verbose):
        dataset = open_data(data, where, verbose=verbose)
        artifact = _encode_with_progress(settings, dataset, where)
    emit(_summary(artifact, dataset, where), title=artifact.manifest.ref, as_json=as_json)
    if not as_json:
        stderr.print(
            f"stored at {artifact.uri}\nnext: forge-ray sid fit {data} "
            f"vectors.space={artifact.manifest.name} --store {store}",
            soft_wrap=True,
        )


def _summary(artifact: Artifact, dataset: Dataset, store: ArtifactStore) -> dict[str, Any]:
    metrics = artifact.manifest.metrics
    return {
        "space": artifact.manifest.name,
        "vectors": artifact.manifest.ref,
        "items": dataset.num_items,
        "dim": open_space(artifact.manifest.ref, dataset, store).dim,
        **{f"rejected_{cause}": count for cause, count in metrics["rejected"].items()},
        "shards": metrics["shards"],
        "shards_resumed": metrics["shards_resumed"],
        "seconds": metrics["seconds"],
        "path": artifact.uri,
    }


def _encode_with_progress(
    settings: EncoderConfig, dataset: Dataset, store: ArtifactStore
) -> Artifact:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(f"encoding {settings.kind}", total=dataset.num_items)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return encode_items(settings, dataset, store, report=report)
