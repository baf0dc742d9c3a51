"""`forge-ray gr stages`: FORGE's chain of stages and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    ConfigFile,
    Overrides,
    StoreUri,
    Verbose,
    emit,
    open_store,
    stderr,
    working,
)
from forge_ray.config import load_config
from forge_ray.data.chain import stage_chain
from forge_ray.data.schema import Dataset
from forge_ray.sid.storage import table_source

if TYPE_CHECKING:
    from forge_ray.gr.stages import SidVariant, StageRow, StagesConfig


def stages(
    data: Annotated[str, typer.Argument(help="Any one stage of a split.")],
    overrides: Overrides = None,
    sids: Annotated[
        list[str] | None,
        typer.Option("--sids", help="SID table of the items; may be repeated."),
    ] = None,
    config: ConfigFile = None,
    run_dir: Annotated[
        str, typer.Option("--run-dir", help="Where checkpoints go: a path or URI nodes share.")
    ] = "./forge-runs",
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train on each stage, evaluate on the days after it, and continue on the next.

    Prints HR@20, 100, 500 and 1000 per stage, SID table and backbone, continued and from scratch.

    Example: forge-ray gr stages toy-s1 --sids sids/toy-s1-0123456789ab train.max_steps=500
    """
    from forge_ray.gr.stages import StagesConfig, check_stages, run_stages
    from forge_ray.launch.connect import connected

    settings = load_config(StagesConfig, path=config, overrides=overrides or ())
    where = open_store(store)
    chain = stage_chain(where, data)
    note_chain(chain)
    variants = [sid_variant(ref, chain[0], where) for ref in sids or []]
    if not variants:
        raise typer.BadParameter("give --sids with a SID table of the stages' items")
    check_stages(chain, variants)
    for one in variants:
        _note_later(one, chain[0])
    folder = run_dir if "://" in run_dir else str(Path(run_dir).resolve())
    with connected(verbose=verbose), working("training the stages"):
        rows = run_stages(chain, variants, settings, store=where, run_dir=folder, tell=_tell)
    emit([_line(row, settings) for row in rows], title=_title(chain), as_json=as_json)


def sid_variant(ref: str, first: Dataset, store: ArtifactStore) -> SidVariant:
    """A SID table of the stages' items by reference.

    Args:
        ref: a stored table, or an `.npz` file.
        first: one of the stages.
        store: where stored tables are.

    Raises:
        ConfigError: a stored table was fitted on another log.
    """
    from forge_ray.gr.stages import SidVariant

    source = table_source(store, ref, first)
    if isinstance(source, Path):
        # Trials have folders of their own.
        return SidVariant(source.stem, source.resolve(), first)
    return SidVariant(source.manifest.ref.split("/", 1)[1], source, first)


def note_chain(chain: Sequence[Dataset]) -> None:
    """Prints which datasets the stages are, by the numbers that rows and `rollout` count."""
    names = (one.artifact.manifest.ref.split("/", 1)[1] for one in chain)
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(names, start=1))
    stderr.print(f"stages: {shown}", highlight=False, soft_wrap=True)


def _note_later(variant: SidVariant, first: Dataset) -> None:
    if not isinstance(variant.source, Path) and first.key not in variant.source.manifest.parents:
        stderr.print(
            f"note: {variant.name} was not fitted on the first stage, {first.name}: where it read "
            "interactions, it knows of days that earlier stages are measured on",
            highlight=False,
        )


def _tell(row: StageRow) -> None:
    shown = "  ".join(f"{k} {v:.4f}" for k, v in row.metrics.items() if k in ("HR@20", "HR@100"))
    stderr.print(
        f"stage {row.stage}  {row.sids}  {row.backbone}  {row.training}  {shown}",
        highlight=False,
        soft_wrap=True,
    )


def _line(row: StageRow, settings: StagesConfig) -> dict[str, Any]:
    return {
        "stage": row.stage,
        "SIDs": row.sids,
        "backbone": row.backbone,
        "training": row.training,
        "steps": row.steps,
        "users": int(row.metrics["users"]),
        **{f"HR@{k}": row.metrics[f"HR@{k}"] for k in sorted(settings.evaluate.ks)},
        "model": row.model,
    }


def _title(chain: list[Dataset]) -> str:
    return f"Stages {chain[0].name} to {chain[-1].name}, {chain[0].num_items:,} items"
