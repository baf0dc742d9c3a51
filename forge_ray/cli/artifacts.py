"""`forge-ray artifacts`: what is in the store, and what may go."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from forge_ray.artifacts import Manifest
from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    StoreUri,
    emit,
    open_store,
    stdout,
)
from forge_ray.config import to_mapping

app = typer.Typer(no_args_is_help=True, help="List, show and remove stored artifacts.")

Ref = Annotated[str, typer.Argument(help="kind/name-key, a key prefix, a name or a directory.")]


@app.command("ls")
def list_artifacts(
    kind: Annotated[str | None, typer.Argument(help="Only this kind, e.g. datasets.")] = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """List the artifacts of the store, oldest first."""
    rows = [_summary(manifest) for manifest in open_store(store).manifests(kind)]
    emit(rows, title=f"Artifacts in {store}", as_json=as_json)


@app.command("show")
def show_artifact(ref: Ref, store: StoreUri = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Show one artifact's manifest: configuration, parents, rows, metrics, versions."""
    manifest = open_store(store).open(ref).manifest
    if as_json:
        emit(to_mapping(manifest), title="", as_json=True)
        return
    stdout.print_json(manifest.to_json())


@app.command("rm")
def remove_artifact(
    ref: Ref,
    store: StoreUri = DEFAULT_STORE,
    force: Annotated[bool, typer.Option(help="Also when others were built from it.")] = False,
) -> None:
    """Remove one artifact; refused while others were built from it."""
    removed = open_store(store).remove(ref, force=force)
    stdout.print(f"removed {removed.ref} ({removed.size_bytes:,} bytes)")


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "artifact": manifest.ref,
        "bytes": manifest.size_bytes,
        "rows": ", ".join(f"{name} {count:,}" for name, count in manifest.rows.items()),
        "created": manifest.created,
    }
