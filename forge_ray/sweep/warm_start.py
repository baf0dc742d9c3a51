"""Starts a sweep from what earlier sweeps found.

Trials of theirs that compute what a trial of this sweep would (same key, judged alike) teach the
sampler as they are. Whatever differs, be it fresher data or a longer training, their best designs
come first in the plan. None is a control of the gate: they were chosen for their results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError
from forge_ray.sweep.config import IDENTITY, without_running
from forge_ray.sweep.ledger import Ledger, TrialRecord
from forge_ray.sweep.limits import is_finite
from forge_ray.sweep.searcher import Resolved
from forge_ray.sweep.space import Point, Space

_JUDGED_BY = ("metric", "evaluation")


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What the sampler and the plan begin with.

    Attributes:
        first: Points to run before any other of the space, the best of each sweep in turn.
        taught: Finished trials for the sampler, none of them among `first`.
        lines: What came from where, a line for each earlier sweep.
    """

    first: list[Point] = field(default_factory=list)
    taught: list[TrialRecord] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def read_earlier(
    sweeps: Sequence[str],
    *,
    best: int,
    folder: Path,
    space: Space,
    meaning: Mapping[str, Any],
    resolve: Callable[[Point], Resolved],
) -> WarmStart:
    """Reads earlier sweeps; writes nothing.

    Args:
        sweeps: Names of sweeps beside this one, or paths of their folders.
        best: How many of the best designs of each to run first.
        folder: Folder of this sweep.
        space: Its space: designs outside are left out.
        meaning: Its identity.
        resolve: Applies a point to its settings.

    Raises:
        ConfigError: A sweep is not there, or is this one.
    """
    found = WarmStart()
    firsts: set[str] = set()
    for name in sweeps:
        source = _folder_of(name, folder)
        known = [one for one in Ledger(source).read().finished() if space.contains(one.point)]
        keys = {one.key: _resolved(one.point, resolve) for one in known}
        ranked = _ranked(known, str(meaning["metric"]))
        chosen = [one for one in ranked if _may_run(keys[one.key], firsts)][:best]
        firsts |= {_key(keys[one.key]) for one in chosen}
        is_alike = _is_judged_alike(source, meaning)
        same = [one for one in known if is_alike and one.key == _key(keys[one.key])]
        found.first.extend(one.point for one in chosen)
        found.taught.extend(same)
        found.lines.append(_line(name, len(chosen), len(same), len(known)))
    return WarmStart(first=found.first, taught=_unique(found.taught, firsts), lines=found.lines)


def _folder_of(name: str, folder: Path) -> Path:
    source = Path(name).resolve() if "/" in name else folder.parent / name
    if source == folder or not (source / IDENTITY).exists():
        raise ConfigError(
            f"warm_start.sweeps must name other sweeps that ran, got {name!r} ({source}). Name one "
            f"of {folder.parent}, or give the path of its folder."
        )
    return source


def _resolved(point: Point, resolve: Callable[[Point], Resolved]) -> Resolved | None:
    try:
        return resolve(point)
    except ConfigError:  # its fields are not all there under the settings of this sweep
        return None


def _key(resolved: Resolved | None) -> str:
    return "" if resolved is None else resolved.key


def _may_run(resolved: Resolved | None, taken: Collection[str]) -> bool:
    return resolved is not None and resolved.rejected is None and resolved.key not in taken


def _ranked(records: Sequence[TrialRecord], metric: str) -> list[TrialRecord]:
    """Complete trials that have the metric, best first."""
    valued = [
        one for one in records if one.state == "complete" and is_finite(one.final.get(metric))
    ]
    return sorted(valued, key=lambda one: (-float(one.final[metric]), one.number))


def _is_judged_alike(source: Path, meaning: Mapping[str, Any]) -> bool:
    theirs = without_running(json.loads((source / IDENTITY).read_text(encoding="utf-8")))
    ours = json.loads(json.dumps(meaning))
    return all(theirs.get(name) == ours[name] for name in _JUDGED_BY)


def _unique(records: Sequence[TrialRecord], but: Collection[str]) -> list[TrialRecord]:
    kept = {one.key: one for one in records if one.key not in but}
    return list(kept.values())


def _line(name: str, chosen: int, same: int, known: int) -> str:
    why = "" if same else "; none computes what a trial of this sweep would"
    return (
        f"warm start from {name}: {known} finished trials lie in the space, {chosen} of the best "
        f"run first, {same} teach the sampler{why}"
    )
