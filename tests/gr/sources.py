"""Models for recommendation tests; a module of its own, because Ray actors import it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_ray.gr.source import LoadedGenerator
from forge_ray.gr.tasks import Prompts
from forge_ray.sid.table import SidTable
from tests.gr.generators import HashGenerator, random_codes

SIZES = (6, 5, 4)


@dataclass(frozen=True)
class HashSource:
    """A picklable source of the hash generator over colliding SIDs."""

    key: str = "hash-model"
    num_items: int = 200
    is_broken: bool = False

    @property
    def num_levels(self) -> int:
        return len(SIZES)

    @property
    def prompts(self) -> Prompts:
        return Prompts()

    def load(self, device: str) -> LoadedGenerator:
        assert device == "cpu"
        generator = HashGenerator(SIZES)
        if self.is_broken:
            generator.logits[1][:] = torch.nan
        table = SidTable.from_codes(random_codes(self.num_items, SIZES), SIZES)
        return LoadedGenerator(generator, table, max_history=5)
