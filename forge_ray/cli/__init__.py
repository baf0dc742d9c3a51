"""The command line: each command parses, loads a configuration, calls one stage and prints.

Sub-apps live in the modules beside this one; nothing here computes.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import typer
from rich.markup import escape

from forge_ray.cli.console import setup_logging, stderr
from forge_ray.errors import ForgeError

GROUPS = {
    "data": "Import, synthesise, prepare, describe and validate datasets.",
    "embed": "Make vector spaces of texts and images.",
    "sid": "Fit, score and show semantic IDs.",
    "gr": "Train, evaluate and use generative-retrieval models.",
    "sweep": "Run, watch, report and finalize pruned sweeps over SID designs.",
    "cluster": "Make Ray clusters, submit sweeps to them, follow and stop them.",
    "artifacts": "List, show and remove stored artifacts.",
}
COMMANDS = {"dashboard": "Show sweeps in a browser: studies, report, links."}


def build_app(words: Sequence[str]) -> typer.Typer:
    """Assembles the command tree; only the group that `words` names is imported.

    The others stand in by name and help: importing every library (Ray, torch, Optuna) would make
    `forge-ray --help` take seconds.
    """
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Semantic IDs, generative retrieval and pruned sweeps over both, on Ray.",
    )
    wanted = next((word for word in words if not word.startswith("-")), None)
    for name, text in GROUPS.items():
        if name == wanted:
            group = importlib.import_module(f"forge_ray.cli.{name}").app
        else:
            group = typer.Typer()
            group.callback(invoke_without_command=True)(_stand_in)
        app.add_typer(group, name=name, help=text)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"forge_ray.cli.{name}") if name == wanted else None
        app.command(name, help=text)(getattr(module, name) if module else _stand_in)
    return app


def _stand_in() -> None:
    """Never runs: a group that is named on the command line is imported."""


def main() -> None:
    """Entry point of `forge-ray`: a failure the user can act on is one line and exit code 2."""
    # Before torch loads: idle OpenMP threads that spin take the cores of Ray's workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = sys.argv[1:]
    verbose = "--verbose" in words or "-v" in words
    setup_logging(verbose=verbose)
    try:
        build_app(words)()
    except ForgeError as error:
        if verbose:
            raise
        stderr.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
