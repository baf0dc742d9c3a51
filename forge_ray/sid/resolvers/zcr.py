"""`zcr`: zero-collision reassignment, the exact one with the fewest changed codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from forge_ray.sid.resolvers.assignment import AssignmentConfig, Movers, per_group


@dataclass(kw_only=True)
class ZcrConfig(AssignmentConfig):
    """Make SIDs unique by new last codes: as few changes as possible, then the nearest ones.

    Per prefix group of at most K items, the assignment of items to last codes with
    cost(i, c) = M·1[c ≠ c_i] + d²(i, c), M = K·(max d² + 1e-6). Larger groups stay.

    Source: CollisionGenRec's zero-collision reassignment. An item that is alone on its SID keeps it
    in every optimum, so only colliding items enter. Where we differ: ties are broken by solving the
    rows in the order of their id hashes instead of by a term of 1e-12 in the cost.
    """

    kind: Literal["zcr"] = "zcr"

    def costs(self, distances: npt.NDArray[np.float64], movers: Movers) -> npt.NDArray[np.float64]:
        """Distance, plus more than all distances together for another code than the own one."""
        largest = np.maximum.reduceat(distances.max(axis=1), movers.starts)
        change = distances.shape[1] * (largest + 1e-6)
        costs = distances + per_group(change, movers)
        each = np.arange(len(costs))
        costs[each, movers.own] = distances[each, movers.own]
        return costs
