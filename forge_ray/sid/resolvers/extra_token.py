"""`extra_token`: one more level that numbers the items of each SID."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forge_ray.sid.resolvers.append import finish_numbers, number_items
from forge_ray.sid.resolvers.base import Placement, Problem, Resolution, ResolverConfig


@dataclass(kw_only=True)
class ExtraTokenConfig(ResolverConfig):
    """Append a level that numbers the items of each SID from 0 on.

    Source: TIGER (arXiv 2305.05065), section 3.1. We number by the hash of the item id, and append
    nothing to a table without collisions.
    """

    kind: Literal["extra_token"] = "extra_token"

    def level_written(self, num_levels: int) -> int:
        """The level that is appended."""
        return num_levels

    def place(self, problem: Problem) -> Placement:
        """Number the items of each SID by the hash of their id."""
        return number_items(problem, problem.hashes)

    def finish(self, placement: Placement, problem: Problem) -> Resolution:
        """Drop the level again when nothing collides."""
        return finish_numbers(placement, problem)
