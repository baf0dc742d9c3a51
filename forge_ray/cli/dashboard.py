"""`forge-ray dashboard`: the studies, reports and links of sweeps in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge_ray.cli.console import DEFAULT_STORE, StoreUri, Verbose, open_store, stderr
from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.sweep.config import SweepConfig


def dashboard(
    items: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]... [KEY=VALUE]...",
            help="Sweep files, and overrides for all of them; none shows all sweeps of the store.",
        ),
    ] = None,
    store: StoreUri = DEFAULT_STORE,
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to listen on; anyone who reaches it can read.")
    ] = "127.0.0.1",
    verbose: Verbose = False,
) -> None:
    """Show sweeps in a browser: studies, report, links; reads only, also while they run."""
    from forge_ray.launch.dashboard import Dashboard, ShownSweep, serve, sweeps_in
    from forge_ray.sweep.sweep import sweep_folder

    words = items or []
    overrides = [one for one in words if "=" in one]
    files = [Path(one) for one in words if "=" not in one]
    opened = open_store(store)
    configs = [load_config(SweepConfig, path=one, overrides=overrides) for one in files]
    shown = [ShownSweep(config=one, folder=sweep_folder(one, opened)) for one in configs]
    if not files:
        shown = sweeps_in(Path(opened.uri))
    if not shown:
        raise ConfigError(
            f"--store must hold a sweep that ran, got none in {store}. Name a sweep file."
        )
    serve(
        Dashboard(shown),
        host=host,
        port=port,
        ready=lambda url: stderr.print(f"sweeps: {url}  (Ctrl-C ends it)", soft_wrap=True),
    )
