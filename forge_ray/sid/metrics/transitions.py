"""Held-out transitions seen through codes: how much of a SID the next item shares with the last.

Pure NumPy. Symbol statistics cannot see this: permuting the rows of a table leaves them as they are
and brings the ratio here to 1. The caller says which events are held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.sid.metrics.quality import PrefixIds, prefix_ids
from forge_ray.sid.metrics.similarity import common_prefix


@dataclass(frozen=True)
class HeldOutTransitions:
    """From the last item of each history to a held-out one; steps to the same item are left out."""

    source: npt.NDArray[np.int64]
    """Item index [M]."""
    target: npt.NDArray[np.int64]
    """Item index [M]."""
    weight: npt.NDArray[np.float64]
    """Share of the user that each stands for [M]."""


@dataclass(frozen=True)
class LcpReport:
    """Common prefixes of held-out transitions; see the fields."""

    held_out: float
    """Mean length of the common prefix, in codes; NaN without transitions."""
    standard_error: float
    """Of `held_out`."""
    random: float
    """The same for two different items drawn by train popularity: exact, nothing is sampled."""
    ratio: float
    """held_out / random; 1 for codes without behaviour, NaN when `random` is 0. Read it beside its
    two parts: many even codes make the denominator tiny."""
    overlap: float
    """Mean number of equal codes at any level, prefix or not."""
    num_transitions: int
    """Transitions M."""


def lcp_report(
    codes: npt.NDArray[np.integer[Any]],
    transitions: HeldOutTransitions,
    train_counts: npt.NDArray[np.integer[Any]],
    *,
    prefixes: PrefixIds | None = None,
) -> LcpReport:
    """Compare held-out transitions with popularity-matched random pairs.

    Args:
        codes: integer codes [N, L].
        transitions: held-out steps.
        train_counts: train interactions of each item [N]; 0.5 is added, as held-out items may have
            none.
        prefixes: `prefix_ids(codes)` when the caller has them already.

    Source: the denominator is the expectation of what the literature samples: with mass p_l(s) on
    each prefix s, P(common prefix ≥ l) = Σ_s p_l(s)², pairs of one item taken out.
    """
    source, target, weight = transitions.source, transitions.target, transitions.weight
    shared = common_prefix(codes[source], codes[target])
    mean = _mean(shared, weight)
    squares = np.square(weight * (shared - mean))
    chance = _expected_prefix(
        prefix_ids(codes) if prefixes is None else prefixes, train_counts + 0.5
    )
    return LcpReport(
        held_out=mean,
        standard_error=float(np.sqrt(squares.sum()) / weight.sum()) if len(source) else mean,
        random=chance,
        ratio=mean / chance if chance > 0 else float("nan"),
        overlap=_mean((codes[source] == codes[target]).sum(axis=1), weight),
        num_transitions=len(source),
    )


def _expected_prefix(prefixes: PrefixIds, mass: npt.NDArray[np.floating[Any]]) -> float:
    """Mean common prefix of two different items drawn in proportion to their mass."""
    share = mass / mass.sum()
    same_item = float(np.square(share).sum())
    if same_item >= 1.0:
        return float("nan")
    equal = [float(np.square(np.bincount(ids, weights=share)).sum()) for ids in prefixes.ids]
    return sum((chance - same_item) / (1.0 - same_item) for chance in equal)


def _mean(values: npt.NDArray[np.integer[Any]], weight: npt.NDArray[np.float64]) -> float:
    return float((values * weight).sum() / weight.sum()) if len(values) else float("nan")
