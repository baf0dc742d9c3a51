"""`forge-ray sweep run|status|report|finalize`: search SID designs, prune early, rank honestly."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    Overrides,
    StoreUri,
    Verbose,
    emit,
    open_store,
    stderr,
)
from forge_ray.config import load_config
from forge_ray.launch.connect import connected
from forge_ray.sweep.budget import budget_state
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import Ledger, SweepRecords
from forge_ray.sweep.views import counts, finalize_rows, ranking_rows, trial_rows

app = typer.Typer(no_args_is_help=True, help="Search SID designs; bad ones end before training.")

SweepFile = Annotated[Path, typer.Argument(help="Sweep definition, e.g. sweeps/quickstart.yaml.")]


@app.command()
def run(
    file: SweepFile,
    overrides: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
    is_dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Print trials, what they share and cost; run nothing."),
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a sweep, or continue it: the same command resumes after any interruption.

    Exit code 0: every trial ran to an end; 1: stopped before (Ctrl-C, a spent budget), or trials
    failed and none is complete.
    """
    from forge_ray.cli import sweep_budget
    from forge_ray.launch.preflight import check_before_sweep
    from forge_ray.launch.preflight_sweep import shared_places
    from forge_ray.sweep.sweep import run_sweep

    config = load_config(SweepConfig, path=file, overrides=overrides or ())
    if is_dry:
        sweep_budget.show_dry_run(config, open_store(store), as_json=as_json)
        return
    with connected(verbose=verbose):
        check_before_sweep(shared_places(open_store(store), config))
        words = ("forge-ray", "sweep", "run", str(file), *(overrides or ()), "--store", store)
        result = run_sweep(config, open_store(store), command=words)
    _print_result(config, result.records, as_json=as_json, report=result.report)
    if not as_json:
        sweep_budget.show_stop(result.records, config.budget)
    failure = _failure(result.records)
    if failure:
        stderr.print(failure, soft_wrap=True, markup=False, highlight=False)
    if failure or not result.is_complete:
        raise typer.Exit(1)


@app.command()
def status(
    file: SweepFile,
    overrides: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Redraw until no driver runs; Ctrl-C ends it.")
    ] = False,
    shows_all: Annotated[
        bool, typer.Option("--all", help="Every trial, also where there are very many.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show where every trial stands and the best so far; reads only, also while the sweep runs."""
    from forge_ray.cli import sweep_status

    config, folder = _open(file, overrides, open_store(store))
    view = sweep_status.StatusView(config, folder, shows_all=shows_all)
    state = (sweep_status.watch if watch else sweep_status.show)(view, as_json=as_json)
    if not as_json and not state.is_running and state.counts["open"]:
        words = shlex.join([str(file), *(overrides or []), "--store", store])
        stderr.print(
            f"no driver is running; continue with: forge-ray sweep run {words}", soft_wrap=True
        )


@app.command()
def report(
    file: SweepFile,
    overrides: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write the HTML report of what is known so far and print its path."""
    from forge_ray.sweep.sweep import make_report

    config, folder = _open(file, overrides, open_store(store))
    _print_result(
        config, Ledger(folder).read(), as_json=as_json, report=make_report(config, folder)
    )


@app.command()
def finalize(
    file: SweepFile,
    overrides: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Use the test split: once, for the winner and the floors; later calls print the figures."""
    from forge_ray.sweep.sweep import finalize_sweep

    config = load_config(SweepConfig, path=file, overrides=overrides or ())
    with connected(verbose=verbose):
        record = finalize_sweep(config, open_store(store))
    rows = finalize_rows(record, metric=config.metric)
    shown = rows if as_json else [_short(row, config.metric) for row in rows]
    emit(shown, title=f"{config.name}: test split, used {record.time}", as_json=as_json)


_json: dict[str, Any] = {"title": "", "as_json": True}


def _open(
    file: Path, overrides: list[str] | None, store: ArtifactStore
) -> tuple[SweepConfig, Path]:
    from forge_ray.sweep.sweep import sweep_folder

    config = load_config(SweepConfig, path=file, overrides=overrides or ())
    return config, sweep_folder(config, store)


def _print_result(
    config: SweepConfig, records: SweepRecords, *, as_json: bool, report: Path
) -> None:
    state = dataclasses.asdict(budget_state(records, config.budget))
    ranking = ranking_rows(records, metric=config.metric)
    test = finalize_rows(records.finalized[-1], metric=config.metric) if records.finalized else []
    if as_json:
        trials = trial_rows(records, metric=config.metric)
        content = {"counts": counts(records), "ranking": ranking, "trials": trials, "test": test}
        content["budget"] = state
        emit({**content, "report": str(report)}, **_json)
        return
    if ranking:
        rows = [_short(row, config.metric) for row in ranking]
        emit(rows, title=f"{config.name}, validation: {_sentence(records)}", as_json=False)
    else:
        stderr.print(f"{config.name}: no trial is complete yet; {_sentence(records)}")
    if test:
        title = f"test split, used {len(records.finalized)} time(s)"
        emit([_short(row, config.metric) for row in test], title=title, as_json=False)
    stderr.print(f"report: {report}", soft_wrap=True)


_COLUMNS = {"backoff_bits": "bits", "uniqueness": "unique"}


def _short(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """A row for the terminal: few columns, the metric with its standard error."""
    hit = f"ItemHit@{metric.rpartition('@')[2]}"
    names = ("rank", "trial", "model", "design", hit, metric, f"{metric}_se", *_COLUMNS)
    shown = {name: row[name] for name in names if name in row}
    return {_COLUMNS.get(name, name.replace(f"{metric}_se", "±")): shown[name] for name in shown}


def _failure(records: SweepRecords) -> str:
    """One line where trials failed and none is complete; else empty."""
    found = counts(records)
    if found["complete"] or not found["failed"]:
        return ""
    reason = next(one.reason for one in records.trials.values() if one.state == "failed")
    return (
        f"no trial is complete and {found['failed']} of {len(records.trials)} failed, the first "
        f"with: {reason}. Remove the cause; the same command tries them again."
    )


def _sentence(records: SweepRecords) -> str:
    return ", ".join(f"{value} {name}" for name, value in counts(records).items() if value)
