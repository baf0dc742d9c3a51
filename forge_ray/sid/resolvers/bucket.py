"""`bucket`: collisions stay; a SID names a bucket of items that is ranked later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forge_ray.sid.resolvers.base import Placement, Problem, ResolverConfig


@dataclass(kw_only=True)
class BucketConfig(ResolverConfig):
    """Leave collisions alone: a SID is a bucket of items, ranked inside the bucket later."""

    kind: Literal["bucket"] = "bucket"

    def level_written(self, num_levels: int) -> None:
        """No level."""

    def place(self, problem: Problem) -> Placement:
        """Keep all codes."""
        return Placement(problem.current())
