"""Scores every planned design before any of them trains, so that the promising ones can go first.

Runs the tokenizer stage of the waiting trials, `max_concurrent` at a time, in threads of the
driver: the stage itself works in Ray tasks and leaves artifacts that the trial finds. Each answer
goes to the ledger when it comes; a killed sweep asks only for what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from ray.exceptions import RayError

from forge_ray.errors import ForgeError
from forge_ray.sweep.ledger import Ledger
from forge_ray.sweep.searcher import TrialSpec
from forge_ray.sweep.space import label_point
from forge_ray.sweep.trial import StageReport, Stages

logger = logging.getLogger(__name__)


def score_waiting(
    waiting: Sequence[TrialSpec],
    *,
    stages: Stages,
    ledger: Ledger,
    known: Mapping[str, Mapping[str, Any]],
    max_concurrent: int,
) -> dict[str, dict[str, Any]]:
    """Proxies of the waiting designs by trial key.

    Args:
        waiting: Trials that have not run; infeasible ones are left out.
        stages: The work.
        ledger: Gets one `scored` event for each design.
        known: Proxies of designs that were scored before.
        max_concurrent: Stages at a time.

    Returns:
        Without the designs that could not be scored: their trial fails with the reason.
    """
    scores = {one.key: dict(known[one.key]) for one in waiting if one.key in known}
    asked = [one for one in waiting if one.key not in scores and not one.infeasible]
    if asked:
        logger.info("scoring %d designs, the promising ones train first", len(asked))
    with ThreadPoolExecutor(max_concurrent) as pool:
        running = {pool.submit(stages.tokenize, one.config): one for one in asked}
        try:
            for future in as_completed(running):
                report = _report(future, running[future])
                if report is not None:
                    held = stages.resources(running[future].config)
                    _record(ledger, running[future], report, held)
                    scores[running[future].key] = report.metrics
        except BaseException:
            # Ctrl-C: what has not begun must not hold up the end.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return scores


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
