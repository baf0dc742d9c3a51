"""What every command shares at the terminal: tables, JSON, progress and failures.

Results go to standard output, everything else to standard error, so that `--json` can be piped.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from forge_ray.artifacts import ArtifactStore
from forge_ray.secrets import masked
from forge_ray.sweep.ledger import json_ready

_FILE_WIDTH = 140
"""Columns where no terminal says its own: a log or a pipe need not wrap at 80."""


class _MaskingConsole(Console):
    """Leaves passwords out of the texts that it prints, e.g. those of an artifact's URI."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; tables and other renderables pass as they are."""
        super().print(*[masked(one) if isinstance(one, str) else one for one in objects], **options)


def _console(stream: TextIO) -> Console:
    knows_width = stream.isatty() or "COLUMNS" in os.environ
    return _MaskingConsole(stderr=stream is sys.stderr, width=None if knows_width else _FILE_WIDTH)


stdout = _console(sys.stdout)
stderr = _console(sys.stderr)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file with the stage's configuration.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value items that override the configuration.")
]
StoreUri = Annotated[
    str,
    typer.Option("--store", envvar="FORGE_RAY_STORE", help="Artifact store: a path or s3://… URI."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, not tables.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's logs and tracebacks.")]
DEFAULT_STORE = "./forge-store"


def open_store(uri: str) -> ArtifactStore:
    """The store that `--store` names."""
    return ArtifactStore(uri)


def setup_logging(*, verbose: bool) -> None:
    """Sends our log lines to standard error; libraries stay quiet unless verbose."""
    handler = RichHandler(console=stderr, show_path=False, show_level=verbose, markup=False)
    handler.setFormatter(_Masking("%(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("forge_ray").setLevel(logging.DEBUG if verbose else logging.INFO)


class _Masking(logging.Formatter):
    """Leaves passwords out, e.g. those in the URI of a store."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def emit(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Any], *, title: str, as_json: bool
) -> None:
    """Prints rows (or one record) as JSON or as a table, without the passwords of URLs in them.

    Args:
        rows: Records with the same keys, or one record, printed as key and value.
        title: Heading of the table.
        as_json: JSON instead, one object or a list of objects, NaN as null.
    """
    rows = _without_passwords(rows)
    if as_json:
        text = json.dumps(json_ready(rows), indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text + "\n")
        return
    if isinstance(rows, Mapping):
        rows = [{"": key, "value": value} for key, value in rows.items()]
    print_table(rows, title=title)


def _without_passwords(value: Any) -> Any:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: _without_passwords(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_passwords(one) for one in value)
    return value


def print_table(rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Prints records as one table, numbers right-aligned."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        numeric = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[format_value(row.get(column)) for column in columns])
    stdout.print(table)


def format_value(value: Any) -> str:
    """A cell: four significant decimals for fractions, `–` for nothing, thousands for counts."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)


@contextmanager
def working(description: str) -> Iterator[None]:
    """Shows a spinner with the elapsed time while a long stage runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        progress.add_task(description)
        yield
