"""How much of the metric's variation each searched parameter goes along with.

A description of the trials that were run, not a cause, and not a model of the space: trials of a
sweep are few, and a parameter under a `when` is missing from many of them, which forests (fANOVA)
and PED-ANOVA, as Optuna has them, leave out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge_ray.sweep.ledger import TrialRecord

CAUTION_BELOW = 20
"""Fewer trials say little: one lucky design moves every share."""
_MAX_GROUPS, _NUM_BINS = 5, 3


@dataclass(frozen=True, kw_only=True)
class Importance:
    """One parameter.

    Attributes:
        name: Its dotted name.
        share: Adjusted share of the variance between its groups, in [0, 1].
        num_trials: Complete trials that have the parameter.
        num_groups: Groups they form: its values, or thirds of them where it has many numbers.
    """

    name: str
    share: float
    num_trials: int
    num_groups: int


def importances(records: Sequence[TrialRecord]) -> list[Importance]:
    """Every parameter that varies among the complete trials that have it, largest share first.

    The share is epsilon squared, the analysis of variance's share of variance between groups less
    what as many groups would explain by chance.

    Source: Kelley 1935, "An unbiased correlation ratio measure".
    """
    done = [one for one in records if one.state == "complete" and one.value is not None]
    found = []
    for name in dict.fromkeys(name for one in done for name in one.point):
        having = [one for one in done if name in one.point]
        groups = _groups([one.point[name] for one in having])
        num_groups = len(set(groups))
        # Every group of one trial leaves nothing to compare with.
        if 1 < num_groups < len(having):
            values = np.array([one.value for one in having], dtype=np.float64)
            share = _epsilon_squared(values, np.array(groups))
            entry = Importance(
                name=name, share=share, num_trials=len(having), num_groups=num_groups
            )
            found.append(entry)
    return sorted(found, key=lambda one: -one.share)


def _groups(values: Sequence[Any]) -> list[int]:
    distinct = sorted({json.dumps(one) for one in values})
    is_numeric = all(isinstance(one, (int, float)) for one in values)
    if is_numeric and len(distinct) > _MAX_GROUPS:
        numbers = np.array(values, dtype=np.float64)
        edges = np.quantile(numbers, np.arange(1, _NUM_BINS) / _NUM_BINS)
        return [int(one) for one in np.searchsorted(edges, numbers, side="left")]
    return [distinct.index(json.dumps(one)) for one in values]


def _epsilon_squared(values: np.ndarray[Any, Any], groups: np.ndarray[Any, Any]) -> float:
    total = float(((values - values.mean()) ** 2).sum())
    labels = np.unique(groups)
    if total == 0.0:
        return 0.0
    within = sum(
        float(((values[groups == one] - values[groups == one].mean()) ** 2).sum()) for one in labels
    )
    noise = within / (len(values) - len(labels))
    return max(0.0, 1.0 - noise * (len(values) - 1) / total)
