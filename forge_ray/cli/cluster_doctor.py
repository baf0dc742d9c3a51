"""`forge-ray cluster doctor`: is this cluster fit for a sweep, and what to do where it is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    Overrides,
    StoreUri,
    Verbose,
    emit,
    open_store,
    working,
)
from forge_ray.config import load_config
from forge_ray.launch.connect import connected


def doctor(
    file: Annotated[
        Path | None, typer.Argument(help="Sweep whose trials the cluster must hold.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            envvar="RAY_ADDRESS",
            help="Ray to look at: `auto` or host:port; none starts one here.",
        ),
    ] = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check storage, versions, clocks, network, disks, GPUs and auth of every node.

    Exit code 0: nothing failed; 1: something did, and its line says what to do.
    """
    from forge_ray.launch.preflight import examine
    from forge_ray.launch.preflight_sweep import check_resources, compiles, shared_places
    from forge_ray.sweep.config import SweepConfig

    config = load_config(SweepConfig, path=file, overrides=overrides or ()) if file else None
    opened = open_store(store)
    with connected(address=address, verbose=verbose), working("asking every node"):
        findings = examine(
            shared_places(opened, config), compiles=config is not None and compiles(config)
        )
        if config is not None:
            findings.append(check_resources(config, opened))
    rows = [dataclasses.asdict(one) for one in findings]
    emit(rows, title=f"{len(rows)} checks", as_json=as_json)
    if any(one.verdict == "failed" for one in findings):
        raise typer.Exit(1)
