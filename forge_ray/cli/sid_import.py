"""`forge-ray sid import`: SIDs that came with the items, as a table that other commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from forge_ray.cli.console import DEFAULT_STORE, AsJson, StoreUri, Verbose, emit, open_store, stderr
from forge_ray.cli.inputs import open_data
from forge_ray.errors import ConfigError
from forge_ray.sid.columns import code_columns, table_of_columns, write_npz


def import_(
    data: Annotated[str, typer.Argument(help="Prepared dataset with codes among its items.")],
    output: Annotated[Path, typer.Argument(help="File to write, ending in .npz.")],
    column: Annotated[
        list[str] | None,
        typer.Option(help="Column of a level's codes, first level first; default: …lv1, …lv2 …"),
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            help="Codes available at a level, first level first; default: one size for "
            "all, the power of two above the largest code."
        ),
    ] = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write SIDs that stand in columns of the items, as FORGE publishes them, as a SID table.

    Example: forge-ray sid import tiny-s1 forge-final.npz --size 8192 --size 8192 --size 8192
    """
    if output.suffix != ".npz" or ":/" in str(output):
        raise ConfigError(
            f"output must be a local path that ends in .npz, got {output}. Rename it: SIDs are "
            "told by the ending."
        )
    dataset = open_data(data, open_store(store), verbose=verbose)
    columns = column or code_columns(dataset)
    if size and len(size) != len(columns):
        raise ConfigError(
            f"--size must be given once per level, got {size} for {columns}. Add or remove some."
        )
    table = table_of_columns(dataset, columns, size or ())
    keys = table.prefix_keys(table.num_levels)
    write_npz(output, table, dataset)
    facts = {
        "columns": columns,
        "items": table.num_items,
        "codebook_sizes": "x".join(str(one) for one in table.codebook_sizes),
        "uniqueness": len(np.unique(keys)) / len(keys),
        "path": str(output),
    }
    emit(facts, title=f"SIDs of {dataset.artifact.manifest.ref}", as_json=as_json)
    if not as_json:
        ref = dataset.artifact.manifest.ref
        stderr.print(f"next: forge-ray sid score {output} --data {ref} --store {store}")
