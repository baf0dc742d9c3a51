"""The ancestry of beams against a loop, and what it costs to write down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forge_ray.gr.models.base import BeamTree


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    size_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.size_bytes = max(self.size_bytes, found.nbytes)
        return found


def grown(widths: list[int], *, rows: int) -> BeamTree:
    generator = torch.Generator().manual_seed(0)
    tree, before = BeamTree.root(rows, torch.device("cpu")), 1
    for width in widths:
        tree = tree.extend(torch.randint(0, before, (rows, width), generator=generator))
        before = width
    return tree


@pytest.mark.parametrize("widths", [[1], [3, 5], [4, 2, 7]])
def test_a_beam_sees_its_ancestors_alone(widths: list[int]) -> None:
    tree = grown(widths, rows=3)
    visible = tree.visible()
    assert visible.dtype == torch.bool
    assert visible.shape == (3, widths[-1], sum(widths))
    for row in range(3):
        for beam in range(widths[-1]):
            ancestors = tree.ancestors[row, beam].tolist()
            seen = [sum(widths[:step]) + one for step, one in enumerate(ancestors)]
            assert visible[row, beam].nonzero().flatten().tolist() == seen


def test_the_mask_is_made_in_its_own_size() -> None:
    tree = grown([200, 200], rows=2)
    with Largest() as largest:
        visible = tree.visible()
    assert largest.size_bytes == visible.nbytes == 2 * 200 * 400
