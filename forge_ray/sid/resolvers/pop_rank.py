"""`pop_rank`: one more level that holds the popularity rank of an item inside its SID."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forge_ray.errors import ConfigError
from forge_ray.sid.resolvers.append import finish_numbers, number_items
from forge_ray.sid.resolvers.base import Placement, Problem, Resolution, ResolverConfig


@dataclass(kw_only=True)
class PopRankConfig(ResolverConfig):
    """Append the rank of each item inside its SID by train interactions, 0 for the most popular.

    A generator can learn this level: the same small numbers mean popular items everywhere.

    Source: MMGRec (arXiv 2404.16555), section 3.2. We count on the train part only, rank from 0,
    and break ties by the hash of the item id. New items take the next ranks, whatever their counts.
    """

    kind: Literal["pop_rank"] = "pop_rank"

    def level_written(self, num_levels: int) -> int:
        """The level that is appended."""
        return num_levels

    def place(self, problem: Problem) -> Placement:
        """Rank the items of each SID by train interactions.

        Raises:
            ConfigError: when the counts are not given.
        """
        if problem.train_counts is None:
            raise ConfigError(
                "resolver.kind must be one that needs no train counts for a table without a "
                "dataset, got 'pop_rank'. Set resolver.kind=extra_token."
            )
        return number_items(problem, -problem.train_counts, problem.hashes)

    def finish(self, placement: Placement, problem: Problem) -> Resolution:
        """Drop the level again when nothing collides."""
        return finish_numbers(placement, problem)
