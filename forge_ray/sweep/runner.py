"""Runs a sweep, from its file to its ledger, and continues it from whatever a dead driver left.

Every session starts a fresh Tuner over the trials that are left. The long-lived memory is the
ledger (outcomes), the plan, the scheduler's state, Optuna's storage and the artifact store; nothing
is restored from Tune's own pickles.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from optuna.storages import BaseStorage
from pyarrow.fs import LocalFileSystem
from ray import tune

from forge_ray.config import canonical_json, to_yaml
from forge_ray.errors import ConfigError
from forge_ray.quiet_tune import quiet_tune
from forge_ray.secrets import masked_url, masked_words, without_password
from forge_ray.sweep.budget import BudgetWatch, check_affordable, stop_event
from forge_ray.sweep.config import (
    CHANGEABLE,
    DRAWING,
    IDENTITY,
    ResourceConfig,
    SweepConfig,
    difference,
    identity,
    without_running,
)
from forge_ray.sweep.demands import Room, measure_room
from forge_ray.sweep.environment import describe_environment
from forge_ray.sweep.estimate import (
    Estimator,
    TrialEstimate,
    estimate_lines,
    estimate_waiting,
    measure_siblings,
)
from forge_ray.sweep.events import SweepCallback
from forge_ray.sweep.faults import explaining
from forge_ray.sweep.gate import late_start
from forge_ray.sweep.ledger import Ledger, SweepRecords, write_json
from forge_ray.sweep.metrics import exporting
from forge_ray.sweep.plan import (
    PLAN,
    Sieve,
    check_space,
    describe_rejections,
    make_plan,
    quasi_random_points,
)
from forge_ray.sweep.prescore import score_waiting
from forge_ray.sweep.scheduler import GateScheduler
from forge_ray.sweep.searcher import PrunedAwareOptunaSearch, Resolved, TrialSource
from forge_ray.sweep.space import Point, Space, label_point, parse_space
from forge_ray.sweep.study import (
    Owner,
    adopt_studies,
    check_owner,
    close_unfinished,
    copy_finished,
    make_sampler,
    open_storage,
    study_name,
)
from forge_ray.sweep.trackers.clients import make_trackers
from forge_ray.sweep.trackers.config import check_libraries
from forge_ray.sweep.trackers.feed import feeding
from forge_ray.sweep.trial import Stages, TrialRules, run_trial
from forge_ray.sweep.warm_start import WarmStart, read_earlier

logger = logging.getLogger(__name__)

_CHECKED_DRAWS = 64
SAVED = "sweep.yaml"
"""The sweep file as the last session ran it, less its password."""


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """A sweep made concrete: what the generic machinery needs to know.

    Attributes:
        config: The sweep file.
        folder: The sweep's memory; absolute.
        dataset_key: Key of the dataset, part of the sweep's identity.
        stages: The work of a trial.
        resolve: Applies a point; raises ConfigError where the result is no valid configuration.
        max_steps: Optimizer steps of a full training.
        command: Words of the command that runs it, for the record.
    """

    config: SweepConfig
    folder: Path
    dataset_key: str
    stages: Stages
    resolve: Callable[[Point], Resolved]
    max_steps: int
    command: Sequence[str] = ()

    @property
    def ledger(self) -> Ledger:
        """The event log."""
        return Ledger(self.folder)


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What a session leaves.

    Attributes:
        records: The ledger, folded.
        is_complete: Whether every trial ran to an end; False after Ctrl-C or at the budget.
    """

    records: SweepRecords
    is_complete: bool


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a session would do, before anything is written.

    Attributes:
        space: The searched parameters.
        meaning: The sweep's identity.
        plan: Points of the space in order.
        warm: What earlier sweeps gave.
        records: The ledger, folded.
        source: Trials that are left.
        estimator: Knows what they take.
        estimates: What is ahead of each waiting trial that can work.
    """

    space: Space
    meaning: dict[str, Any]
    plan: list[Point]
    warm: WarmStart
    records: SweepRecords
    source: TrialSource
    estimator: Estimator
    estimates: list[TrialEstimate]


def plan_trials(job: SweepJob) -> Planned:
    """Reads what there is, and resolves and checks what is left; writes nothing.

    Raises:
        ConfigError: The sweep changed under its name, a point is no valid configuration, or the
            budget does not pay for a trial.
    """
    config = job.config
    space = parse_space(config.space)
    check_libraries(config.trackers)
    meaning = identity(config, dataset_key=job.dataset_key)
    check_identity(job.folder, meaning, name=config.name)
    records = job.ledger.read()
    resolve = _naming_point(job.resolve)
    is_drawing = config.sampler.kind in DRAWING
    if is_drawing:
        check_space(space, resolve, draws=_CHECKED_DRAWS)
    sieve = Sieve(resolve)
    warm = read_earlier(
        config.warm_start.sweeps,
        best=config.warm_start.best,
        folder=job.folder,
        space=space,
        meaning=meaning,
        resolve=resolve,
    )
    plan = make_plan(
        config,
        space,
        job.folder,
        sieve,
        first=warm.first,
        started=(one.point for one in records.trials.values()),
    )
    source = TrialSource(
        records=records.trials,
        planned=[*config.points, *plan],
        num_trials=config.num_trials if is_drawing else None,
        resolve=resolve,
        space=space,
    )
    source.rejections += sieve.rejections
    estimator = make_estimator(job, meaning)
    estimates = estimate_waiting(estimator, records, source.queue)
    check_affordable(estimates, config.budget)
    return Planned(
        space=space,
        meaning=meaning,
        plan=plan,
        warm=warm,
        records=records,
        source=source,
        estimator=estimator,
        estimates=estimates,
    )


def run_trials(job: SweepJob) -> RunOutcome:
    """Runs what is left of a sweep; the caller holds its lock.

    Raises:
        ConfigError: See `plan_trials`; no trial has run.
        StorageError: A disk is full, or disk or database stayed away for longer than is waited.
    """
    planned = plan_trials(job)
    storage = masked_url(job.config.storage) or str(job.folder / "optuna.db")
    with explaining(folder=job.folder, storage=storage):
        return _run_session(job, planned)


def _run_session(job: SweepJob, planned: Planned) -> RunOutcome:
    config, ledger = job.config, job.ledger
    records, source = planned.records, planned.source
    room = room_of(job, planned)
    storage = open_storage(config.storage, job.folder)
    owner = _owner(job, records)
    if config.storage:  # a file in the sweep's folder is nobody else's
        check_owner(storage, config.name, owner)
    # Every point resolved. Written earlier, a mistake would become the sweep's identity.
    _write_claim(job, planned.meaning, planned.plan)
    _announce(job, planned)
    ledger.append(
        "session",
        id=owner.id,
        space=config.space,
        remaining=source.remaining,
        dashboard=_ray_dashboard(),
        environment=describe_environment(),
        command=masked_words(job.command),
    )
    closed = close_unfinished(storage, config.name, records.trials)
    if closed:
        logger.info("closed %d Optuna trials that a dead driver left running", closed)
    watch = BudgetWatch(ledger=ledger, config=config.budget, estimator=planned.estimator)
    with (
        exporting(config, job.folder),
        _tracking(job) as tracked,  # which also sends what earlier sessions could not
    ):
        # Whoever may not start a single trial scores none either.
        if source.remaining and watch.may_start(planned.estimates):
            _search(job, planned, watch, ledger, room=room, storage=storage, callbacks=tracked)
    if source.rejections:
        logger.info("%s; they were no trials", describe_rejections(source.rejections))
        ledger.append("rejected", designs=dict(source.rejections))
    after = ledger.read()
    # A trial that was waiting to start when the session ended was never told.
    close_unfinished(storage, config.name, after.trials)
    for record in after.trials.values():
        ledger.write_trial(record)
    cut = [one for one in after.trials.values() if one.state == "running" and source.wants(one.key)]
    is_complete = not (cut or source.unstarted(after.trials) or source.may_draw)
    if watch.reason and not is_complete:
        ledger.append("budget", **stop_event(watch, planned.estimator, cut, source))
    return RunOutcome(records=ledger.read(), is_complete=is_complete)


def _owner(job: SweepJob, records: SweepRecords) -> Owner:
    return Owner(id=records.id or uuid4().hex, folder=str(job.folder), host=platform.node())


def room_of(job: SweepJob, planned: Planned) -> Room:
    """How many trials run at a time on the Ray that is up.

    Raises:
        ConfigError: A trial that is ahead can never be placed.
    """
    config, source = job.config, planned.source
    if not source.remaining:
        return Room(trials=0, scoring=0)
    configs = [one.config for one in source.queue if not one.infeasible]
    if source.may_draw:
        drawn = itertools.islice(quasi_random_points(planned.space, seed=0), _CHECKED_DRAWS)
        configs += [job.resolve(point).config for point in drawn]
    room = measure_room(
        job.stages.demands(configs),
        config.resources.autoscaled,
        max_concurrent=config.max_concurrent,
        limit=source.remaining,
    )
    if config.max_concurrent is None or room.trials < min(config.max_concurrent, source.remaining):
        logger.info("the cluster holds %d trials at a time", room.trials)
    return room


def make_estimator(job: SweepJob, meaning: Mapping[str, Any]) -> Estimator:
    """What estimates a sweep's trials: its ledger, and sweeps beside it on the same dataset."""
    return Estimator(
        stages=job.stages,
        prices=job.config.budget.prices,
        meaning=meaning,
        max_steps=job.max_steps,
        others=measure_siblings(job.folder, dataset_key=job.dataset_key, identity_file=IDENTITY),
    )


def _search(
    job: SweepJob,
    planned: Planned,
    watch: BudgetWatch,
    ledger: Ledger,
    *,
    room: Room,
    storage: BaseStorage,
    callbacks: Sequence[tune.Callback],
) -> None:
    config, space, source = job.config, planned.space, planned.source
    records = planned.records
    scheduler = _scheduler(job)
    scheduler.begin_with(job.resolve(point).key for point in planned.warm.first)
    if config.order == "promising" and len(source.queue) > 1:
        scores = score_waiting(
            source.queue,
            stages=job.stages,
            ledger=ledger,
            known={key: one.proxies for key, one in records.scored.items()},
            max_concurrent=room.scoring,
            watch=watch,
        )
        scheduler.order_by(scores)
        # Scoring may have spent what was left; it also tells more of what a trial takes.
        if not watch.may_start(estimate_waiting(planned.estimator, watch.records, source.queue)):
            return
    searcher = PrunedAwareOptunaSearch(
        space=space,
        source=source,
        ledger=ledger,
        objectives=config.aims,
        # Another seed each session, or it would propose its first points again.
        sampler=make_sampler(
            config.sampler.kind, seed=config.sampler.seed + 1000 * records.sessions
        ),
        study_name=study_name(config.name, config.space, config.aims),
        storage=storage,
        next_place=scheduler.next_place if config.order == "promising" else _in_order,
        prices=config.budget.prices,
        admits=watch.admits,
    )
    adopt_studies(storage, config.name, _owner(job, watch.records))
    copy_finished(
        searcher.study,
        space,
        [*records.finished(), *planned.warm.taught],
        objectives=config.aims,
        prices=config.budget.prices,
    )
    _fit(
        job,
        searcher,
        scheduler=scheduler,
        source=source,
        watch=watch,
        ledger=ledger,
        session=records.sessions,
        max_concurrent=room.trials,
        callbacks=callbacks,
    )


def _tracking(job: SweepJob) -> AbstractContextManager[list[tune.Callback]]:
    trackers = make_trackers(job.config.trackers, sweep=job.config.name, folder=job.folder)
    return feeding(trackers, job.folder)


def _in_order(waiting: Sequence[str]) -> int:
    return 0


def _scheduler(job: SweepJob) -> GateScheduler:
    return GateScheduler(
        gate=job.config.gate,
        asha=job.config.asha,
        metric=job.config.metric,
        max_steps=job.max_steps,
        path=job.folder / "scheduler.json",
    )


def _fit(
    job: SweepJob,
    searcher: PrunedAwareOptunaSearch,
    *,
    scheduler: GateScheduler,
    source: TrialSource,
    watch: BudgetWatch,
    ledger: Ledger,
    session: int,
    max_concurrent: int,
    callbacks: Sequence[tune.Callback],
) -> None:
    config = job.config
    # Read by Tune in this process. Proxy rows lack the metric on purpose; our callback is the log.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    callback = SweepCallback(
        ledger=ledger,
        scheduler=scheduler,
        metric=config.metric,
        num_trials=source.total,
        stages=job.stages,
        watch=watch,
        failure=lambda: searcher.failure,
    )
    rules = TrialRules(gate=config.gate, metric=config.metric)
    # Tune's with_parameters would keep an object in the store as long as this process lives.
    trainable = partial(run_trial, stages=job.stages, rules=rules)
    tuner = tune.Tuner(
        tune.with_resources(trainable, _driver_bundle(config.resources)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=source.remaining,
            max_concurrent_trials=max_concurrent,
            reuse_actors=False,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"session-{session:03d}",
            storage_path=str(job.folder / "tune"),
            # The ledger's first: the others read it.
            callbacks=[callback, *callbacks],
            stop=watch,
            failure_config=tune.FailureConfig(max_failures=config.resources.trial_restarts),
            verbose=0,
        ),
    )
    with quiet_tune(LocalFileSystem(), str(job.folder / "tune")):
        try:
            tuner.fit()
        finally:
            callback.groups.free_all()


def _driver_bundle(resources: ResourceConfig) -> tune.PlacementGroupFactory:
    # The driver of a trial holds memory and no CPU: it waits while its stages work elsewhere.
    bundle = {"CPU": 0, "memory": resources.trial_memory_mb * 1024**2}
    return tune.PlacementGroupFactory(
        [bundle], bundle_label_selector=[dict(resources.driver_labels)]
    )


def _trial_name(trial: Any) -> str:
    return f"{trial.config['number']:03d}-{trial.config['key'][:12]}-{trial.trial_id}"


def check_identity(folder: Path, content: Mapping[str, Any], *, name: str) -> None:
    """Refuses an identity other than the one the sweep began with; a new sweep has none yet.

    Raises:
        ConfigError: Something that decides what a trial means changed.
    """
    path = folder / IDENTITY
    if not path.exists():
        return
    old = without_running(json.loads(path.read_text(encoding="utf-8")))
    changed = difference(old, json.loads(json.dumps(content)))
    if changed:
        raise ConfigError(
            f"sweep {name!r} must keep its settings (only {', '.join(CHANGEABLE)} may change), got "
            f"{'; '.join(changed)}. Set another name: finished artifacts are reused."
        )


def _write_claim(job: SweepJob, meaning: Mapping[str, Any], plan: list[Point]) -> None:
    if not (job.folder / IDENTITY).exists():
        write_json(job.folder / IDENTITY, meaning)
    shown = dataclasses.replace(job.config, storage=without_password(job.config.storage))
    (job.folder / SAVED).write_text(to_yaml(shown), encoding="utf-8")
    write_json(job.folder / PLAN, {"space": job.config.space, "points": plan})


def _naming_point(resolve: Callable[[Point], Resolved]) -> Callable[[Point], Resolved]:
    known: dict[str, Resolved] = {}  # the plan, the queue and a sampler ask for the same points

    def named(point: Point) -> Resolved:
        name = canonical_json(point)
        try:
            if name not in known:
                known[name] = resolve(point)
            return known[name]
        except ConfigError as error:
            raise ConfigError(f"point {{{label_point(point)}}}: {error}") from error

    return named


def _ray_dashboard() -> str:
    if not ray.is_initialized():
        return ""
    # Joins nothing and starts nothing where a Ray is there: it hands out what is known of it.
    address = ray.init(ignore_reinit_error=True, log_to_driver=False).dashboard_url
    return f"http://{address}" if address else ""


def _announce(job: SweepJob, planned: Planned) -> None:
    source = planned.source
    done, left = len(planned.records.finished()), source.remaining
    logger.info(
        "sweep %s: %d trials, %d finished, %d to run; everything is in %s",
        job.config.name,
        source.total,
        done,
        left,
        job.folder,
    )
    if left:
        logger.info("stop it with Ctrl-C; the same command continues where it ended")
    late = late_start(job.config.gate, takes_turns=job.config.takes_turns, num_trials=source.total)
    if late:
        logger.warning("%s", late)
    hourly = job.config.budget.prices.cluster_hour
    for line in (*planned.warm.lines, *estimate_lines(planned.estimates, cluster_hour=hourly)):
        logger.info("%s", line)
