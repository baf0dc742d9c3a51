"""Balanced assignment balances; the contrastive loss equals the published formula."""

from __future__ import annotations

import numpy as np
import torch

from forge_ray.sid.alignment.pair_contrast import PairContrast, false_negatives_of
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


def published_contrast(xa, xb, ra, rb, scales) -> float:
    def cross_entropy(logits: np.ndarray) -> float:
        logits = logits - logits.max(axis=1, keepdims=True)
        log_share = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return float(-np.diag(log_share).mean())

    u = xa / np.linalg.norm(xa, axis=1, keepdims=True)
    v = xb / np.linalg.norm(xb, axis=1, keepdims=True)
    own = (cross_entropy(scales[0] * u @ v.T) + cross_entropy(scales[0] * v @ u.T)) / 2
    ori = (cross_entropy(scales[1] * u @ rb.T) + cross_entropy(scales[1] * v @ ra.T)) / 2
    raw = (cross_entropy(scales[2] * u @ ra.T) + cross_entropy(scales[2] * v @ rb.T)) / 2
    return (own + ori + raw) / 3


def test_contrast_equals_the_published_formula() -> None:
    rng = np.random.default_rng(0)
    xa, xb, ra, rb = (rng.normal(size=(8, 5)) for _ in range(4))
    contrast = PairContrast(temperature=0.07).double()
    with torch.no_grad():
        contrast.log_scales.copy_(torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64))
    loss = contrast(
        (torch.from_numpy(xa), torch.from_numpy(xb)), (torch.from_numpy(ra), torch.from_numpy(rb))
    )
    expected = published_contrast(xa, xb, ra, rb, np.exp([0.3, 1.0, 2.0]))
    assert abs(loss.item() - expected) < 1e-9


def test_temperatures_start_as_configured_and_learn() -> None:
    contrast = PairContrast(temperature=0.07)
    assert torch.allclose(contrast.log_scales.exp(), torch.full((3,), 1 / 0.07))
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(contrast((rows, rows.flip(0)), (rows, rows)))
    assert contrast.log_scales.grad is not None
    assert (contrast.log_scales.grad != 0).all()


def test_options_change_the_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (3 * torch.randn(6, 4, generator=generator) for _ in range(2))
    anchor, positive = torch.tensor([0, 1, 2, 0, 4, 5]), torch.tensor([7, 8, 9, 6, 8, 0])
    plain = PairContrast()((a, b), (a, b))
    mask = false_negatives_of(anchor, positive)
    losses = [
        PairContrast(max_scale=2.0)((a, b), (a, b)),
        PairContrast(normalize_inputs=True)((a, b), (a, b)),
        PairContrast()((a, b), (a, b), false_negatives=mask),
    ]
    assert all(abs(loss.item() - plain.item()) > 1e-4 for loss in losses)
    assert losses[2] < plain


def test_false_negatives_are_shared_items() -> None:
    anchor, positive = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 4, 4, 1])
    marked = {tuple(pair) for pair in false_negatives_of(anchor, positive).nonzero().tolist()}
    assert marked == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)}
