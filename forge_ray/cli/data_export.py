"""`forge-ray data export`: AL-GR files, from an import or from a dataset and its SIDs."""

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
    working,
)
from forge_ray.cli.inputs import open_data
from forge_ray.config import load_config
from forge_ray.data.al_gr.exporting import export_al_gr
from forge_ray.data.al_gr.folder import AlGrFolder
from forge_ray.errors import ConfigError
from forge_ray.launch.connect import connected
from forge_ray.sid.al_gr import AlGrExportConfig, export_dataset
from forge_ray.sid.storage import load_table, table_source


def export(
    source: Annotated[
        str, typer.Argument(help="Folder of `data import --format al-gr`, or a dataset.")
    ],
    output: Annotated[str, typer.Argument(help="Folder to write to.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    sids: Annotated[
        str | None, typer.Option(help="SID table of the dataset's items, or a foreign .npz.")
    ] = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write AL-GR files: those of an import as they were, or a dataset with its SIDs.

    Example: forge-ray data export data/tiny AL-GR-Tiny-again/

    Example: forge-ray data export beauty rows/ --sids sids/beauty-0123456789ab targets=last
    """
    if AlGrFolder.at(source).settings() is not None:
        if sids or overrides or config:
            raise ConfigError(
                f"--sids and overrides must go with a dataset, got an import of files {source}. "
                "Leave them out: files of an import come back as they were."
            )
        with connected(verbose=verbose), working("exporting"):
            back = asdict(export_al_gr(source, output))
        emit(back, title=f"Exported to {output}", as_json=as_json)
        return
    settings = load_config(AlGrExportConfig, path=config, overrides=overrides or ())
    where = open_store(store)
    dataset = open_data(source, where, verbose=verbose)
    table = None if sids is None else load_table(table_source(where, sids, dataset), dataset)
    with connected(verbose=verbose), working("exporting"):
        written = asdict(export_dataset(dataset, table, output, settings))
    emit(written, title=f"Exported to {output}", as_json=as_json)
