"""Asynchronous successive halving by training step, with state that survives a restart.

Source: Li et al. 2018, "Massively parallel hyperparameter tuning" (ASHA), the stopping variant,
with the cut-off of `ray.tune.schedulers.ASHAScheduler` (one bracket). Differs from it in keeping
rungs by the trial's own key as JSON: a resumed trial is not counted twice, and a restored sweep
remembers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from forge_ray.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(kw_only=True)
class AshaConfig:
    """When a trial is stopped during training."""

    enabled: bool = True
    """False trains every trial that passed the gate to the end."""
    grace_steps: int = 0
    """Optimizer steps of the first rung: nobody is stopped before. 0 is a third of `gr.max_steps`:
    an earlier rung lost the best design in most replays (docs/evidence.md)."""
    reduction_factor: float = 2.0
    """One of this many trials passes a rung; rungs lie at grace · factor^k steps."""
    min_earlier: int = 2
    """Trials that must have reached a rung before it stops anyone. Ray's ASHA stops from one on:
    a lucky first trial then ends all others, and nothing is left to audit the proxies with."""

    def __post_init__(self) -> None:
        if self.min_earlier < 1:
            raise ConfigError(f"asha.min_earlier must be >= 1, got {self.min_earlier}. Set 1 or 2.")
        if self.grace_steps < 0:
            raise ConfigError(
                f"asha.grace_steps must be >= 0, got {self.grace_steps}. "
                "0 is a third of gr.max_steps."
            )
        if self.reduction_factor <= 1:
            raise ConfigError(
                f"asha.reduction_factor must be > 1, got {self.reduction_factor}. Set 2, 3 or 4."
            )

    def milestones(self, max_steps: int) -> list[int]:
        """Steps of the rungs below `max_steps`, ascending."""
        steps = []
        milestone = float(self.grace_steps or late_enough(max_steps))
        while milestone < max_steps:
            steps.append(int(milestone))
            milestone *= self.reduction_factor
        return steps


def late_enough(max_steps: int) -> int:
    """First step of a rung at which good designs that learn slowly are safe: a third of all."""
    return math.ceil(max_steps / 3)


@dataclass(kw_only=True)
class AshaState:
    """What the rungs remember; plain JSON data.

    Attributes:
        rungs: Metric of each trial at each rung: `{milestone: {trial key: value}}`.
        stopped: Reasons by trial key: a stopped trial stays stopped.
    """

    rungs: dict[str, dict[str, float]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)


def stop_reason(
    key: str, step: int, value: float, *, max_steps: int, state: AshaState, config: AshaConfig
) -> str | None:
    """Whether this result ends its trial: the reason, or None to go on.

    Args:
        key: Trial key.
        step: Optimizer steps done.
        value: Metric, larger is better.
        max_steps: Steps of a full training; nothing is stopped there.
        state: Updated in place.
        config: Rungs.
    """
    if key in state.stopped:
        return state.stopped[key]
    reached = [one for one in config.milestones(max_steps) if one <= step]
    # One NaN in a rung would make every later cut-off NaN and stop all that come after.
    if not config.enabled or not reached or step >= max_steps or not math.isfinite(value):
        return None
    rung = state.rungs.setdefault(str(reached[-1]), {})
    if key in rung:
        return None
    earlier = list(rung.values())
    rung[key] = value
    if len(earlier) < config.min_earlier:
        return None
    cutoff = float(np.quantile(earlier, 1 - 1 / config.reduction_factor))
    if value >= cutoff:
        return None
    reason = (
        f"asha: {value:.4f} < {cutoff:.4f} at step {step} (rung {reached[-1]}, {len(rung)} trials)"
    )
    state.stopped[key] = reason
    return reason


def value_bounds(state: AshaState, finals: Mapping[str, float]) -> dict[str, float]:
    """What the stopped trials could have reached at most, if learning curves do not cross.

    A trial ends no better than the worst of those that were ahead of it where it was stopped, and
    no better than the best trial where nobody ahead of it has finished.

    Args:
        state: Rungs and stopped trials.
        finals: Final metric of finished trials by key, larger is better.

    Returns:
        Bounds by trial key, for every stopped trial; empty where no trial has finished.
    """
    bounds: dict[str, float] = {}
    best = max(finals.values(), default=-math.inf)
    for _, rung in sorted(state.rungs.items(), key=lambda one: int(one[0])):
        # Ascending: what stands in the end is the bound at the rung that stopped the trial.
        ends = [(value, finals[key]) for key, value in rung.items() if key in finals]
        ahead, worst = _worst_ahead(ends)
        for key in rung.keys() & state.stopped.keys() if finals else ():
            place = int(np.searchsorted(ahead, rung[key], side="left"))
            bounds[key] = float(worst[place]) if place < len(worst) else best
    return bounds


def _worst_ahead(ends: list[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Rung values ascending, and the least final value from each of them upwards."""
    table = np.array(sorted(ends), dtype=np.float64).reshape(-1, 2)
    return table[:, 0], np.minimum.accumulate(table[::-1, 1])[::-1]
