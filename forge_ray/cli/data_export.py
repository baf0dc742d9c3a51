"""`forge-ray data export`: imported AL-GR files back to the files they were."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from forge_ray.cli.console import AsJson, Verbose, emit, working
from forge_ray.data.al_gr.exporting import export_al_gr
from forge_ray.launch.connect import connected


def export(
    source: Annotated[str, typer.Argument(help="Folder of `data import --format al-gr`.")],
    output: Annotated[str, typer.Argument(help="Folder to write to.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write AL-GR files: those of an import, as they were.

    Example: forge-ray data export data/tiny AL-GR-Tiny-again/
    """
    with connected(verbose=verbose), working("exporting"):
        report = export_al_gr(source, output)
    emit(asdict(report), title=f"Exported to {report.directory}", as_json=as_json)
