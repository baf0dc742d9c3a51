"""`knn_cap`: overflow moves to the nearest last code of its prefix that has room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forge_ray.sid.resolvers.base import Int64Array, Placement, Problem, require_source
from forge_ray.sid.resolvers.capacity import CapacityConfig, find_pool


@dataclass(kw_only=True)
class KnnCapConfig(CapacityConfig):
    """At most `cap` items per SID; the others move to the nearest last code that has room.

    Source: FORGE (arXiv 2509.20904), section 3.2, in its deterministic form.
    """

    kind: Literal["knn_cap"] = "knn_cap"

    def rows_to_place(self, problem: Problem) -> Int64Array:
        """The overflow."""
        return find_pool(problem, self.cap)

    def place(self, problem: Problem) -> Placement:
        """Move the overflow by distance.

        Raises:
            ConfigError: when no candidates are given.
        """
        source = problem.candidates
        require_source(source, kind=self.kind, name="nearest codes")
        assert source is not None
        return self.place_with(problem, source)
