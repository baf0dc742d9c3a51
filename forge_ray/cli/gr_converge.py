"""`forge-ray gr converge`: how soon a model on new SIDs is as good as the old one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from forge_ray.cli.gr_stages import note_chain, sid_variant
from forge_ray.config import load_config, to_mapping
from forge_ray.data.chain import stage_chain

if TYPE_CHECKING:
    from forge_ray.gr.converge import ConvergeConfig, Convergence
    from forge_ray.gr.convergence import Summary


def converge(
    data: Annotated[str, typer.Argument(help="Any one stage of a split.")],
    overrides: Overrides = None,
    old: Annotated[str, typer.Option("--old", help="SID table before the change.")] = "",
    new: Annotated[str, typer.Option("--new", help="SID table after it.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for converge.json and converge.html.")
    ] = None,
    config: ConfigFile = None,
    run_dir: Annotated[
        str, typer.Option("--run-dir", help="Where checkpoints go: a path or URI nodes share.")
    ] = "./forge-runs",
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Roll new SIDs out under an online model, in every way, and see how soon it is as good.

    Prints steps until the old model's figure and the gap to it, online and in all, mean of seeds.

    Example: forge-ray gr converge toy-s1 --old SIDS --new OTHER rollout=3 train.max_steps=200
    """
    from forge_ray.gr.converge import ConvergeConfig
    from forge_ray.gr.converge import converge as simulate
    from forge_ray.gr.stages import check_stages
    from forge_ray.launch.connect import connected

    if not old or not new:
        raise typer.BadParameter("give --old and --new, two SID tables of the stages' items")
    settings = load_config(ConvergeConfig, path=config, overrides=overrides or ())
    where = open_store(store)
    chain = stage_chain(where, data)
    note_chain(chain)
    before, after = (sid_variant(ref, chain[0], where) for ref in (old, new))
    check_stages(chain, [before, after])
    folder = run_dir if "://" in run_dir else str(Path(run_dir).resolve())
    with connected(verbose=verbose), working("training the old model and all starts"):
        found = simulate(chain, before, after, settings, store=where, run_dir=folder, tell=_tell)
    if out is not None:
        _write(out, found, settings)
    title = f"From {before.name} to {after.name} at stage {settings.rollout}"
    emit([_line(arm, one) for arm, one in found.summaries.items()], title=title, as_json=as_json)


def _tell(arm: str, seed: int, summary: Summary) -> None:
    at = "not reached" if summary.reached is None else f"reached at step {summary.reached.steps}"
    stderr.print(
        f"{arm}  seed {seed}  {at}  gap {summary.gap_online:.2f}", highlight=False, soft_wrap=True
    )


def _line(arm: str, one: Summary) -> dict[str, Any]:
    reached = one.reached
    return {
        "start": arm,
        "reached after": None if reached is None else reached.steps,
        "… with offline": None if reached is None else reached.total_steps,
        "tokens until then": None if reached is None else reached.total_tokens,
        "gap online": one.gap_online,
        "gap in all": one.gap_total,
        "first": one.first,
        "last": one.last,
        "steps": one.steps,
        "all steps": one.total_steps,
    }


def record(found: Convergence, settings: ConvergeConfig) -> dict[str, Any]:
    """The whole result as JSON types."""
    return {
        "config": to_mapping(settings),
        "summaries": {arm: dataclasses.asdict(one) for arm, one in found.summaries.items()},
        "by_seed": {
            arm: [dataclasses.asdict(one) for one in several]
            for arm, several in found.by_seed.items()
        },
        "curves": {
            arm: [[dataclasses.asdict(point) for point in one] for one in several]
            for arm, several in found.curves.items()
        },
    }


def _write(folder: Path, found: Convergence, settings: ConvergeConfig) -> None:
    from forge_ray.cli.gr_converge_figure import figure

    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(record(found, settings), indent=1, allow_nan=False)
    (folder / "converge.json").write_text(content + "\n", encoding="utf-8")
    drawn = figure(found.mean, settings.metric)
    drawn.write_html(folder / "converge.html", include_plotlyjs=True)
    stderr.print(f"wrote {folder}/converge.json and {folder}/converge.html")
