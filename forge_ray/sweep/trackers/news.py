"""What a tracker has not heard of a trial yet; pure, and the same for every tracker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge_ray.sweep.ledger import TrialRecord


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a tracker holds of a trial; kept between sessions.

    Attributes:
        run: The tracker's own name for the trial's run; empty before there is one.
        step: Optimizer step of the last validation row.
        has_proxies: Whether the proxies are there.
        has_final: Whether the final row is there.
        state: State of the trial.
    """

    run: str = ""
    step: int = -1
    has_proxies: bool = False
    has_final: bool = False
    state: str = ""


@dataclass(frozen=True, kw_only=True)
class News:
    """The rest of a trial: what differs from `Sent`.

    Attributes:
        record: The trial.
        run: The tracker's run; empty asks for a new one.
        scalars: Step and figures, in order of steps: `proxy/…` at 0, curves, `final/…`.
        is_ended: Whether the trial ended.
    """

    record: TrialRecord
    run: str
    scalars: list[tuple[int, dict[str, float]]]
    is_ended: bool


def news_of(record: TrialRecord, sent: Sent) -> News | None:
    """What is to be sent; None where the tracker holds all of it."""
    scalars: list[tuple[int, dict[str, float]]] = []
    if record.proxies and not sent.has_proxies:
        scalars.append((0, figures(record.proxies, prefix="proxy/")))
    rows = [row for row in record.history if row["global_step"] > sent.step]
    scalars += [(int(row["global_step"]), figures(row)) for row in rows]
    if record.final and not sent.has_final:
        scalars.append((_last_step(record), figures(record.final, prefix="final/")))
    if not scalars and record.state == sent.state:
        return None
    is_ended = record.state != "running"
    return News(record=record, run=sent.run, scalars=scalars, is_ended=is_ended)


def after(news: News, run: str, sent: Sent) -> Sent:
    """What the tracker holds once it took the news."""
    return Sent(
        run=run,
        step=max([sent.step, *(int(row["global_step"]) for row in news.record.history)]),
        has_proxies=sent.has_proxies or bool(news.record.proxies),
        has_final=sent.has_final or bool(news.record.final),
        state=news.record.state,
    )


def figures(row: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """The finite numbers of a row, without its step."""
    return {
        f"{prefix}{name}": float(value)
        for name, value in row.items()
        if name != "global_step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def labels(record: TrialRecord) -> dict[str, str]:
    """Words about a trial: key, state, why it was pruned, its artifacts."""
    words = {
        "trial_key": record.key,
        "trial": str(record.number + 1),
        "state": record.state,
        "pruned_by": record.pruned_by,
        "reason": record.reason,
        "gate": record.gate,
        **{f"artifact.{name}": one for name, one in record.artifacts.items()},
    }
    return {name: value for name, value in words.items() if value}


def _last_step(record: TrialRecord) -> int:
    return int(record.history[-1]["global_step"]) if record.history else 0
