"""How users are put into searches: what that costs, and that it changes no list."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from forge_ray.data.ragged import Ragged
from forge_ray.gr.beam import default_widths
from forge_ray.gr.decoding import SidDecoder
from forge_ray.sid.table import SidTable
from tests.gr.generators import HashGenerator


class NotedGenerator(HashGenerator):
    """Notes the users and the beams of each search."""

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        super().__init__(codebook_sizes)
        self.searches: list[tuple[int, int]] = []

    def step(
        self, state: Tensor, parents: Tensor, codes: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        if level == 1:
            self.searches.append((len(parents), parents.shape[1]))
        return super().step(state, parents, codes, level)


def single_table(num_items: int) -> SidTable:
    """A prefix of one code owns one SID, so that a search finds as many as it carries."""
    firsts = np.random.default_rng(0).permutation(num_items)
    return SidTable.from_codes(np.column_stack([firsts, firsts % 2]), (num_items, 2))


def seen(lengths: Sequence[int], num_items: int) -> Ragged:
    rng = np.random.default_rng(1)
    return Ragged.from_lists([rng.permutation(num_items)[:size] for size in lengths], np.int64)


def test_wider_searches_take_fewer_users_by_the_square() -> None:
    table = single_table(1000)
    model = NotedGenerator(table.codebook_sizes)
    decoder = SidDecoder(
        model, table, widths=default_widths(2, max_k=50), max_history=5, batch_users=16, fills=50
    )
    decoder.decode(seen([150] * 12, 1000))
    searches = [one for one in model.searches if one[1] > 50]
    assert sum(users for users, _ in searches) == 12
    assert all(beams == 200 and users * beams**2 <= 16 * 50**2 for users, beams in searches)
