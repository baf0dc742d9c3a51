"""A sweep on the real library: opens its data and folder, runs it, finalizes it, reports it.

What the commands of `forge-ray sweep` call.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import from_mapping
from forge_ray.data.prepare import open_or_prepare
from forge_ray.data.schema import Dataset
from forge_ray.data.synthetic import SyntheticConfig, generate
from forge_ray.errors import ConfigError
from forge_ray.evaluate.floors import evaluate_floors
from forge_ray.placement import stay_on
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import FinalizeRecord, Ledger, SweepLock, SweepRecords, TrialRecord
from forge_ray.sweep.report import write_report
from forge_ray.sweep.resolve import Catalogue, check_rungs, resolve_point, trial_config
from forge_ray.sweep.runner import SweepJob, run_trials
from forge_ray.sweep.stages import ForgeStages
from forge_ray.sweep.trackers.config import check_libraries

logger = logging.getLogger(__name__)

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a finished `sweep run` hands to the command line."""

    records: SweepRecords
    report: Path
    is_complete: bool
    """False after Ctrl-C or at the budget: the same command continues."""


def sweep_folder(config: SweepConfig, store: ArtifactStore) -> Path:
    """Where a sweep keeps its memory.

    Raises:
        ConfigError: The store is remote and the sweep names no folder.
    """
    check_folder(config, store.uri)
    if config.folder:
        return Path(config.folder).resolve()
    return Path(store.uri, "sweeps", config.name)


def check_folder(config: SweepConfig, store_uri: str) -> None:
    """Refuses a sweep that would have no place for its memory; opens no store.

    Raises:
        ConfigError: The store is remote and the sweep names no folder.
    """
    if not config.folder and "://" in store_uri:
        raise ConfigError(
            f"folder must be set when the store is remote, got none for {store_uri}. "
            "Set folder=/path/on/a/shared/disk: ledger and checkpoints go there."
        )


def run_sweep(
    config: SweepConfig, store: ArtifactStore, *, command: Sequence[str] = ()
) -> SweepResult:
    """Runs what is left of a sweep, measures the floors and writes the report; Ray must be up.

    Args:
        config: The sweep file.
        store: The artifact store.
        command: Words of the command that runs it; the report shows them.

    Raises:
        ConfigError: The file, the sweep's identity or a point breaks a rule; no trial has run.
    """
    check_rungs(config)
    check_libraries(config.trackers)
    # Data and floors are cheap stages too: with Ray Data, they would make GPU nodes start.
    stay_on(config.resources.stage_labels)
    folder = sweep_folder(config, store)
    with SweepLock(folder).held():
        dataset = open_dataset(config, store, folder)
        job = replace(make_job(config, store, dataset, folder), command=command)
        outcome = run_trials(job)
        records = outcome.records
        if not outcome.is_complete:
            logger.warning("stopped before its end; the same command continues the sweep")
        # Ctrl-C ends at once; at its budget a sweep has results, to be seen beside the floors.
        if outcome.is_complete or (records.stopped and records.winner()):
            _measure_floors(job, store, dataset, records)
        if outcome.is_complete:
            _conclude(job, store, dataset, records)
    return SweepResult(
        records=job.ledger.read(),
        report=make_report(config, folder),
        is_complete=outcome.is_complete,
    )


def _measure_floors(
    job: SweepJob, store: ArtifactStore, dataset: Dataset, records: SweepRecords
) -> None:
    if not records.floors:
        ks = job.config.evaluation.ks
        job.ledger.append("floors", floors=evaluate_floors(dataset, "validation", ks, store))


def _conclude(job: SweepJob, store: ArtifactStore, dataset: Dataset, records: SweepRecords) -> None:
    """The test split, where the sweep file asks for it and none was used.

    A later run that finds another winner does not touch the test split by itself.
    """
    winner = records.winner()
    if not job.config.finalize or winner is None:
        return
    if not records.finalized:
        _finalize(job, store, dataset)
    elif records.finalized[-1].key != winner.key:
        logger.warning(
            "trial %d is the new winner; `forge-ray sweep finalize` uses the test split again",
            winner.number + 1,
        )


def finalize_sweep(config: SweepConfig, store: ArtifactStore) -> FinalizeRecord:
    """Evaluates the winner and the floors on the test split, once per winner; Ray must be up.

    Raises:
        ConfigError: No trial is complete.
    """
    stay_on(config.resources.stage_labels)
    folder = sweep_folder(config, store)
    with SweepLock(folder).held():
        winner = _winner(Ledger(folder).read(), config.name)
        stored = [one for one in Ledger(folder).read().finalized if one.key == winner.key]
        if stored:
            logger.info(
                "trial %d was finalized before; these are the stored figures", winner.number + 1
            )
            return stored[-1]
        dataset = open_dataset(config, store, folder)
        record = _finalize(make_job(config, store, dataset, folder), store, dataset)
    make_report(config, folder)
    return record


def make_report(config: SweepConfig, folder: Path) -> Path:
    """Writes the report of what the ledger holds; returns its path."""
    path = folder / REPORT
    write_report(path, Ledger(folder).read(), config, is_running=SweepLock(folder).is_held())
    return path


def open_dataset(config: SweepConfig, store: ArtifactStore, folder: Path) -> Dataset:
    """The sweep's dataset; synthetic data is generated where no path is given."""
    if config.data:
        return open_or_prepare(config.data, store)
    raw = raw_folder(folder)
    generate(from_mapping(SyntheticConfig, config.synthetic), str(raw))
    return open_or_prepare(raw, store)


def raw_folder(folder: Path) -> Path:
    """Where a sweep without data of its own generates some."""
    return folder / "data"


def make_job(
    config: SweepConfig, store: ArtifactStore, dataset: Catalogue, folder: Path
) -> SweepJob:
    """Binds a sweep to its dataset and stages."""
    stages = ForgeStages(
        store_uri=store.uri,
        dataset_key=dataset.key,
        run_dir=str(folder / "runs"),
        score=config.score,
        asked=config.resources,
        evaluation=config.evaluation,
        sweep=config.name,
    )
    return SweepJob(
        config=config,
        folder=folder,
        dataset_key=dataset.key,
        stages=stages,
        resolve=lambda point: resolve_point(config, point, dataset=dataset),
        max_steps=trial_config(config, {}).gr.max_steps,
    )


def _winner(records: SweepRecords, name: str) -> TrialRecord:
    winner = records.winner()
    if winner is None:
        raise ConfigError(
            f"sweep {name!r} must have a complete trial to be finalized, got none of "
            f"{len(records.trials)}. Run `forge-ray sweep run` first."
        )
    return winner


def _finalize(job: SweepJob, store: ArtifactStore, dataset: Dataset) -> FinalizeRecord:
    records = job.ledger.read()
    winner = _winner(records, job.config.name)
    if records.finalized:
        logger.warning(
            "the winner changed since the test split was used (%d times so far): its figure is "
            "less honest each time",
            len(records.finalized),
        )
    assert isinstance(job.stages, ForgeStages)
    logger.info("test split: trial %d and the floors", winner.number + 1)
    measured = job.stages.evaluate_split("test", model=winner.artifacts["model"])
    job.ledger.append(
        "finalize",
        key=winner.key,
        number=winner.number,
        winner=measured.metrics,
        floors=evaluate_floors(dataset, "test", job.config.evaluation.ks, store),
    )
    return job.ledger.read().finalized[-1]
