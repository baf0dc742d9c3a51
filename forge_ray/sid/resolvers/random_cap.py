"""`random_cap`: overflow moves to a random last code of its prefix that has room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forge_ray.data.hashing import hashed_orders
from forge_ray.errors import ConfigError
from forge_ray.sid.resolvers.base import Int64Array, IntArray, Placement, Problem
from forge_ray.sid.resolvers.capacity import CapacityConfig


@dataclass(kw_only=True)
class RandomCapConfig(CapacityConfig):
    """At most `cap` items per SID; the others move to a random last code that has room.

    Source: FORGE's public SQL, random policy. An item's order of codes comes from the hash of its
    own id, so growth of the catalogue re-draws nothing.
    """

    kind: Literal["random_cap"] = "random_cap"
    seed: int = 0
    """Another seed gives every item another order of codes."""

    def __post_init__(self) -> None:
        """Check the seed."""
        super().__post_init__()
        if self.seed < 0:
            raise ConfigError(f"resolver.seed must be >= 0, got {self.seed}. Use another seed.")

    def place(self, problem: Problem) -> Placement:
        """Move the overflow by lot."""

        def draws(rows: Int64Array, limit: int) -> IntArray:
            return hashed_orders(problem.hashes[rows], problem.last_size, limit, seed=self.seed)

        return self.place_with(problem, draws)
