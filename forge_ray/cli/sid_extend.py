"""`forge-ray sid extend`: SIDs for the new items of a grown catalogue, the old ones untouched."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Annotated, Any

import numpy as np
import typer

from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    Overrides,
    StoreUri,
    Verbose,
    emit,
    open_store,
    stderr,
    working,
)
from forge_ray.cli.inputs import open_data
from forge_ray.config import load_config
from forge_ray.launch.connect import connected
from forge_ray.sid.config import EncodeConfig
from forge_ray.sid.extend import extend_sids, published_codes
from forge_ray.sid.storage import SidArtifact, open_sids
from forge_ray.threads import set_threads


def extend(
    ref: Annotated[str, typer.Argument(help="Published table: sids/name-key, key prefix, name.")],
    data: Annotated[str, typer.Argument(help="The grown dataset, or a folder of its raw files.")],
    overrides: Overrides = None,
    space: Annotated[str, typer.Option(help="Vector space, where its name has changed.")] = "",
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Give new items SIDs from the frozen quantizer; published items keep theirs, matched by id.

    Overrides are those of the section `encode`, e.g. `max_actors=8`.
    """
    encode = load_config(EncodeConfig, overrides=overrides or ())
    where = open_store(store)
    set_threads(os.cpu_count() or 1)
    sids = open_sids(where, ref)
    dataset = open_data(data, where, verbose=verbose)
    is_small = dataset.num_items <= encode.local_items
    with nullcontext() if is_small else connected(verbose=verbose), working(f"extending {ref}"):
        extended = extend_sids(sids, dataset, where, encode=encode, space=space or None)
    kept = int((published_codes(sids, dataset, where)[:, 0] >= 0).sum())
    emit(
        extend_summary(sids, extended, kept),
        title=f"SID table {extended.artifact.manifest.ref}",
        as_json=as_json,
    )
    if not as_json:
        stderr.print(f"stored at {extended.artifact.uri}")


def extend_summary(sids: SidArtifact, extended: SidArtifact, kept: int) -> dict[str, Any]:
    """What `sid extend` prints: how many items are old, new and gone, and how the new ones fit."""
    metrics = extended.artifact.manifest.metrics
    keys = extended.table.prefix_keys(extended.table.num_levels)
    return {
        "table": extended.artifact.manifest.ref,
        "extends": sids.artifact.manifest.ref,
        "items": extended.table.num_items,
        "kept": kept,
        "new": extended.table.num_items - kept,
        "gone": sids.table.num_items - kept,
        "unplaced": metrics["unplaced"],
        "uniqueness": len(np.unique(keys)) / len(keys),
        "codebook_sizes": "x".join(str(size) for size in extended.table.codebook_sizes),
        "path": extended.artifact.uri,
    }
