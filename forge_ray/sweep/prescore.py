"""Scores every planned design before any of them trains, so that the promising ones can go first.

Runs the tokenizer stage of the waiting trials, `max_concurrent` at a time, in threads of the
driver: the stage itself works in Ray tasks and leaves artifacts that the trial finds. Each answer
goes to the ledger when it comes; a killed sweep asks only for what is missing. Nothing is begun
beyond the budget, and what is left unscored waits for the plan to reach it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Future,
    ThreadPoolExecutor,
    wait,
)
from typing import Any

from ray.exceptions import RayError

from forge_ray.errors import ForgeError
from forge_ray.sweep.budget import BudgetWatch
from forge_ray.sweep.ledger import Ledger
from forge_ray.sweep.patience import outlast
from forge_ray.sweep.searcher import TrialSpec
from forge_ray.sweep.space import label_point
from forge_ray.sweep.trial import StageReport, Stages

logger = logging.getLogger(__name__)

_LOOK_S = 1.0


def score_waiting(
    waiting: Sequence[TrialSpec],
    *,
    stages: Stages,
    ledger: Ledger,
    known: Mapping[str, Mapping[str, Any]],
    max_concurrent: int,
    watch: BudgetWatch,
) -> dict[str, dict[str, Any]]:
    """Proxies of the waiting designs by trial key.

    Args:
        waiting: Trials that have not run; infeasible ones are left out.
        stages: The work.
        ledger: Gets one `scored` event for each design.
        known: Proxies of designs that were scored before.
        max_concurrent: Stages at a time.
        watch: Says when the budget is spent: no further design is begun then.

    Returns:
        Without the designs that could not be scored, whose trial fails with the reason, and those
        that the budget did not reach.
    """
    scores = {one.key: dict(known[one.key]) for one in waiting if one.key in known}
    asked = deque(one for one in waiting if one.key not in scores and not one.infeasible)
    if asked:
        logger.info("scoring %d designs, the promising ones train first", len(asked))
    ending = threading.Event()
    running: dict[Future[StageReport], TrialSpec] = {}
    with ThreadPoolExecutor(max_concurrent) as pool:
        try:
            while running or asked:
                while asked and len(running) < max_concurrent and not _is_spent(watch, asked):
                    spec = asked.popleft()
                    running[pool.submit(_tokenize, stages, spec, ending)] = spec
                done, _ = wait(running, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
                watch.beat_if_due()
                for future in done:
                    spec = running.pop(future)
                    report = _report(future, spec)
                    if report is not None:
                        _record(ledger, spec, report, stages.resources(spec.config))
                        scores[spec.key] = report.metrics
        except BaseException:
            # Ctrl-C: what waits for its storage must not hold up the end.
            ending.set()
            raise
    return scores


def _is_spent(watch: BudgetWatch, asked: deque[TrialSpec]) -> bool:
    reason = watch.state().spent_reason
    if reason:
        logger.warning("%s; %d designs stay unscored", reason, len(asked))
        asked.clear()
    return bool(reason)


def _tokenize(stages: Stages, spec: TrialSpec, ending: threading.Event) -> StageReport:
    def pause(seconds: float) -> None:
        if ending.wait(seconds):
            raise CancelledError

    return outlast(
        lambda: stages.tokenize(spec.config),
        say=lambda text: logger.warning("scoring %s: %s", label_point(spec.point), text),
        sleep=pause,
    )


def _report(future: Future[StageReport], spec: TrialSpec) -> StageReport | None:
    try:
        return future.result()
    except (ForgeError, RayError) as error:
        reason = str(error).strip().splitlines()[-1]
        logger.warning("could not score %s: %s", label_point(spec.point), reason)
        return None


def _record(ledger: Ledger, spec: TrialSpec, report: StageReport, held: StageReport) -> None:
    ledger.append(
        "scored",
        key=spec.key,
        proxies=report.metrics,
        seconds=report.seconds,
        cpus=held.cpus,
        gpus=held.gpus,
        places=report.places,
        cached=report.cached,
    )
