"""The command line: each command parses, loads a configuration, calls one stage and prints.

Sub-apps live in the modules beside this one; nothing here computes.
"""

from __future__ import annotations

import sys

import typer

from forge_ray.cli.console import setup_logging, stderr
from forge_ray.errors import ForgeError


def build_app() -> typer.Typer:
    """Assembles the sub-apps; imported here because each pulls its own libraries."""
    from forge_ray.cli import artifacts, data, gr, sid, sweep

    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Semantic IDs, generative retrieval and pruned sweeps over both, on Ray.",
    )
    app.add_typer(data.app, name="data")
    app.add_typer(sid.app, name="sid")
    app.add_typer(gr.app, name="gr")
    app.add_typer(sweep.app, name="sweep")
    app.add_typer(artifacts.app, name="artifacts")
    return app


def main() -> None:
    """Entry point of `forge-ray`: a failure the user can act on is one line and exit code 2."""
    verbose = "--verbose" in sys.argv or "-v" in sys.argv
    setup_logging(verbose=verbose)
    try:
        build_app()()
    except ForgeError as error:
        if verbose:
            raise
        stderr.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
