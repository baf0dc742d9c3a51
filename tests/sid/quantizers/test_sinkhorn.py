"""Balanced assignment balances, and equals the published formula."""

from __future__ import annotations

import numpy as np
import torch

from forge_ray.sid.quantizers.sinkhorn import balanced_assignment


def published_assignment(distances: np.ndarray, iterations: int = 5) -> np.ndarray:
    """FORGE's formula, written out with its [K, B] layout."""
    spread = (distances - distances.mean()) / (distances.std(ddof=1) + 1e-6)
    spread = spread - spread.min()
    plan = np.exp(-10 * spread).T
    plan = plan / plan.sum()
    num_codes, batch = plan.shape
    for _ in range(iterations):
        plan = plan / plan.sum(axis=1, keepdims=True) / num_codes
        plan = plan / plan.sum(axis=0, keepdims=True) / batch
    return (plan * batch).argmax(axis=0)


def test_assignment_equals_the_published_formula_and_balances() -> None:
    generator = torch.Generator().manual_seed(0)
    # Most points near one code: the nearest code alone would leave the others almost empty.
    distances = torch.rand(512, 16, generator=generator)
    distances[:, 0] -= 0.5
    codes = balanced_assignment(distances, iterations=5, sharpness=10.0)
    assert np.array_equal(codes.numpy(), published_assignment(distances.double().numpy()))
    nearest = torch.bincount(distances.argmin(dim=1), minlength=16)
    balanced = torch.bincount(codes, minlength=16)
    assert balanced.max() < nearest.max() / 2
    plain = balanced_assignment(distances, iterations=0, sharpness=10.0)
    assert torch.equal(plain, distances.argmin(dim=1))
