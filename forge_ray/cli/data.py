"""`forge-ray data`: import, synthesize, prepare, describe, validate, export, queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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
from forge_ray.cli.data_export import export
from forge_ray.cli.data_queries import queries
from forge_ray.config import load_config
from forge_ray.data.al_gr.importing import AlGrImportConfig, import_al_gr
from forge_ray.data.convert import ImportConfig, import_data
from forge_ray.data.describe import describe
from forge_ray.data.prepare import PrepareConfig, prepare
from forge_ray.data.published import published_stages
from forge_ray.data.schema import Dataset
from forge_ray.data.sources import SourcesConfig
from forge_ray.data.splits import PublishedConfig
from forge_ray.data.synthetic import SyntheticConfig, generate
from forge_ray.data.validate import Finding, validate, validate_dataset
from forge_ray.errors import DataError
from forge_ray.launch.connect import connected

app = typer.Typer(
    no_args_is_help=True, help="From raw logs to datasets: import, synthesize, prepare, inspect."
)

app.command()(export)
app.command()(queries)

T = TypeVar("T")

SourceAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(help="A folder with conventional names, then key=value overrides."),
]


@app.command("import")
def import_command(
    arguments: SourceAndOverrides = None,
    config: ConfigFile = None,
    format_: Annotated[
        Literal["tables", "al-gr"],
        typer.Option("--format", help="tables: a log, items and vectors; al-gr: FORGE's files."),
    ] = "tables",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Convert CSV, JSONL, Parquet and .npz files to Parquet shards with conventional names.

    Example: forge-ray data import raw/ output=data/mine interactions.user_id=userid

    With --format al-gr, any mix of FORGE's published files; it goes on where it was interrupted:
    forge-ray data import AL-GR-Tiny/ --format al-gr version=final output=data/tiny
    """
    if format_ == "al-gr":
        _import_al_gr(_load(AlGrImportConfig, arguments, config), as_json, verbose=verbose)
        return
    loaded = _load(ImportConfig, arguments, config)
    with connected(verbose=verbose), working("importing"):
        report = import_data(loaded)
    emit(asdict(report), title=f"Imported to {report.directory}", as_json=as_json)
    _say(f"Next: forge-ray data prepare {report.directory}")


def _import_al_gr(config: AlGrImportConfig, as_json: bool, *, verbose: bool) -> None:
    with connected(verbose=verbose), working("importing"):
        report = import_al_gr(config)
    emit(asdict(report), title=f"Imported to {report.directory}", as_json=as_json)
    if report.skipped:
        _say(f"Rows left out: their file, row, id, cause and text are in {config.output}/rejects/")
    names = [name for name, kind in report.files.items() if kind == "sequences"]
    if names:
        split = " split.kind=published" if _form_stages(names) else ""
        _say(f"Next: forge-ray data prepare {report.directory}{split}")


def _form_stages(names: Sequence[str]) -> bool:
    try:
        published_stages(PublishedConfig(), names)
    except DataError:
        return False
    return True


@app.command("synthesize")
def synthesize_command(
    directory: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a synthetic catalogue, vectors and log of any size.

    Example: forge-ray data synthesize data/toy num_items=2000 num_users=4000 seed=0
    """
    loaded = load_config(SyntheticConfig, path=config, overrides=overrides or ())
    with connected(verbose=verbose), working("generating"):
        written = generate(loaded, str(directory))
    emit(asdict(written), title="Synthetic data", as_json=as_json)
    _say(f"Next: forge-ray data prepare {directory}")


@app.command("prepare")
def prepare_command(
    arguments: SourceAndOverrides = None,
    config: ConfigFile = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Index items, order sequences, cut splits and count pairs; one dataset artifact per stage.

    Example: forge-ray data prepare data/mine split.kind=temporal split.num_stages=3
    """
    loaded = _load(PrepareConfig, arguments, config)
    with connected(verbose=verbose), working("preparing"):
        datasets = prepare(loaded, open_store(store))
    rows = [{"dataset": d.artifact.manifest.ref, **d.rows, "at": d.artifact.uri} for d in datasets]
    if as_json:
        emit(rows, title="", as_json=True)
        return
    for row in rows:
        emit(row, title=str(row["dataset"]), as_json=False)
    _say(f"Next: forge-ray data describe {rows[-1]['dataset']} --store {store}")


@app.command("describe")
def describe_command(
    dataset: Annotated[str, typer.Argument(help="kind/name-key, a key prefix or a directory.")],
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show counts, length and popularity quantiles, cold share and tied timestamps of a dataset."""
    found = describe(Dataset.open(open_store(store), dataset))
    if as_json:
        emit(asdict(found), title="", as_json=True)
        return
    emit(found.to_rows(), title=found.dataset, as_json=False)


@app.command("validate")
def validate_command(
    arguments: SourceAndOverrides = None,
    config: ConfigFile = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check raw files, or a prepared dataset, and list every kind of problem with an example.

    Exit code 0: prepare accepts the files; 2: it does not.
    """
    findings = _validate(arguments, config, store, verbose=verbose)
    rows = [asdict(finding) for finding in findings]
    if as_json or rows:
        emit(rows, title="Problems", as_json=as_json)
    if findings:
        raise typer.Exit(2)
    _say("No problems found.")


def _validate(
    arguments: list[str] | None, config: Path | None, store: str, *, verbose: bool
) -> list[Finding]:
    source = (arguments or [""])[0]
    if source and "=" not in source and config is None and not _is_raw(source):
        return validate_dataset(Dataset.open(open_store(store), source))
    # `prepare` configurations are accepted as they are: what is checked is their sources.
    loaded = _load(PrepareConfig, arguments, config)
    with connected(verbose=verbose), working("validating"):
        return validate(_only_sources(loaded))


def _only_sources(config: PrepareConfig) -> SourcesConfig:
    names = SourcesConfig.__dataclass_fields__
    return SourcesConfig(**{name: getattr(config, name) for name in names})


def _is_raw(source: str) -> bool:
    return Path(source).is_dir() and not Path(source, "manifest.json").exists()


def _load(schema: type[T], arguments: Sequence[str] | None, config: Path | None) -> T:
    """Load a configuration whose first argument may be the bare source folder."""
    rest = list(arguments or ())
    values: dict[str, Any] = {}
    if rest and "=" not in rest[0]:
        values["source"] = rest.pop(0)
    return load_config(schema, path=config, overrides=rest, values=values)


def _say(text: str) -> None:
    stderr.print(text, highlight=False, soft_wrap=True)
