"""Parts of the RQ-VAE against formulas written out by hand: assignment, gradients, batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from forge_ray.config import from_mapping
from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import TrainingPairs, TrainingSet
from forge_ray.sid.quantizers.rq_vae import RqVae, RqVaeConfig, data_facts
from forge_ray.sid.quantizers.rq_vae_batches import Feed, plan_batches
from forge_ray.sid.quantizers.rq_vae_codebooks import random_depths
from forge_ray.sid.quantizers.rq_vae_network import quantize, rotated, straight_through
from forge_ray.sid.quantizers.sinkhorn import (
    SinkhornConfig,
    SinkhornLastConfig,
    balanced_assignment,
    uniform_assignment,
)
from forge_ray.sid.quantizers.workers import Workers
from tests.contracts.quantizer_contract import clustered_vectors

FORGE: dict[str, Any] = {
    "hidden": [16, 16],
    "latent_dim": 8,
    "codebook_size": 8,
    "unit_variance": False,
    "kmeans_init": False,
    "dead_code_restart": False,
    "ema": False,
    "alignment": {
        "kind": "forge_i2i",
        "max_scale": None,
        "normalize_inputs": False,
        "mask_false_negatives": False,
    },
    "batch_size": 64,
    "pair_batch_size": 32,
    "pair_share": 0.5,
    "max_steps": 12,
    "lr": 2e-3,
    "warmup": 40 / 150,
}
"""FORGE's recipe at a small size."""


def config(**changes: Any) -> RqVaeConfig:
    return from_mapping(RqVaeConfig, {**FORGE, **changes})


def published_uniform(distances: np.ndarray, epsilon: float, rounds: int) -> np.ndarray:
    """LC-Rec's centred Sinkhorn, row by row."""
    middle = (distances.max() + distances.min()) / 2
    scaled = (distances - middle) / (distances.max() - middle + 1e-5)
    plan = np.exp(-scaled / epsilon)
    plan /= plan.sum()
    rows, codes = plan.shape
    for _ in range(rounds):
        for row in range(rows):
            plan[row] /= plan[row].sum() * rows
        for code in range(codes):
            plan[:, code] /= plan[:, code].sum() * codes
    return plan.argmax(axis=1)


def test_uniform_assignment_equals_the_formula_and_spreads() -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(64, 16, generator=generator)
    distances[:, 3] -= 0.6
    codes = uniform_assignment(distances, iterations=50, epsilon=0.003)
    assert np.array_equal(codes.numpy(), published_uniform(distances.double().numpy(), 0.003, 50))
    counts = torch.bincount(codes, minlength=16)
    nearest = torch.bincount(distances.argmin(1), minlength=16)
    assert counts.max() < 0.6 * nearest.max()
    assert nearest.min() == 0
    assert counts.min() >= 2


def test_the_last_level_alone_is_balanced() -> None:
    distances = torch.rand(32, 8, generator=torch.Generator().manual_seed(1))
    last, every = SinkhornLastConfig(), SinkhornConfig()
    assert last.assign(distances, is_last=False, workers=Workers()) is None
    balanced = last.assign(distances, is_last=True, workers=Workers())
    assert torch.equal(balanced, uniform_assignment(distances, iterations=50, epsilon=0.003))
    assert torch.equal(
        every.assign(distances, is_last=False, workers=Workers()),
        balanced_assignment(distances, iterations=5, sharpness=10.0),
    )
    with pytest.raises(ConfigError, match=r"epsilon must be >= 0\.002"):
        SinkhornLastConfig(epsilon=1e-4)


def test_balancing_reads_whole_distances() -> None:
    """Rows far from every codeword weigh in the standardisation, as in FORGE."""
    setting = config()
    network = RqVae(setting, 16, seed=0).network
    latents = 4 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    batch = quantize(network, latents, setting)
    full = torch.cdist(latents, network.codebooks[0].detach()).square()
    expected = balanced_assignment(full, iterations=5, sharpness=10.0)
    assert (batch.codes[0] == expected).float().mean() > 0.98


def test_rotation_trick_turns_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    z, q = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    q[5] = -3 * z[5]
    for row in range(6):
        point = z[row].clone().requires_grad_()
        out = rotated(point[None], q[row][None])[0]
        assert torch.allclose(out, q[row], atol=1e-9)
        jacobian = torch.autograd.functional.jacobian(
            lambda x, row=row: _frozen_rotation(x, z[row], q[row]), z[row]
        )
        found = torch.stack(
            [torch.autograd.grad(out[i], point, retain_graph=True)[0] for i in range(5)]
        )
        assert torch.allclose(found, jacobian, atol=1e-9)
        if row == 5:
            continue  # opposite directions: the value is right, the map is no rotation
        stretch = q[row].norm() / z[row].norm()
        # A rotation times a factor: its columns are orthogonal and of equal length.
        assert torch.allclose(found @ found.T, stretch**2 * torch.eye(5, dtype=z.dtype), atol=1e-8)


def _frozen_rotation(x: torch.Tensor, z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    unit_z, unit_q = z / z.norm(), q / q.norm()
    total = unit_z + unit_q
    r = total / total.norm().clamp(min=1e-12)
    matrix = torch.eye(5, dtype=z.dtype) - 2 * torch.outer(r, r) + 2 * torch.outer(unit_q, unit_z)
    return q.norm() / z.norm() * matrix @ x


def test_straight_through_leaves_the_gradient() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    torch.autograd.backward(straight_through(z, torch.zeros(3, 4)).sum())
    assert torch.equal(z.grad, torch.ones(3, 4))


def test_random_depths_cut_the_share_of_rows() -> None:
    depths = random_depths(30_000, 3, 0.6, seed=(1, 2))
    shares = torch.bincount(depths, minlength=4) / 30_000
    assert torch.allclose(shares, torch.tensor([0, 0.2, 0.2, 0.6]), atol=0.02)
    setting = config(levels=3, assignment={"kind": "nearest"})
    network = RqVae(setting, 16, seed=0).network
    latents = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    cut = quantize(network, latents, setting, depths=torch.tensor([1, 2, 3]))
    for row, depth in enumerate((1, 2, 3)):
        words = sum(network.codebooks[level][cut.codes[level][row]] for level in range(depth))
        assert torch.allclose(cut.quantized[row], words, atol=1e-6)


def test_a_batch_follows_from_its_step() -> None:
    pairs = {"co_occurrence": TrainingPairs(np.arange(50), np.arange(50) + 100)}
    plan = plan_batches(
        config(max_steps=40, batch_size=30), 200, {"co_occurrence": 50},
        shares={"co_occurrence": 1.0}, seed=7,
    )  # fmt: skip
    assert (plan.kinds == 0).sum() == 20
    plain = [plan.share(s, pairs).plain for s in range(40) if plan.kinds[s] < 0]
    first = np.concatenate(plain)[:200]
    assert np.array_equal(np.sort(first), np.arange(200))
    ends = [plan.share(s, pairs) for s in range(40) if plan.kinds[s] == 0]
    assert all(np.array_equal(rows.positive, rows.anchor + 100) for rows in ends)
    assert len(np.unique(np.concatenate([ends[0].anchor, ends[1].anchor])[:50])) == 50
    for step in range(40):
        whole = plan.share(step, pairs)
        parts = [plan.share(step, pairs, rank=rank, size=2) for rank in range(2)]
        assert np.array_equal(np.concatenate([p.plain for p in parts]), whole.plain)
        assert np.array_equal(np.concatenate([p.anchor for p in parts]), whole.anchor)


def test_sources_share_the_pair_steps() -> None:
    shares = {"co_occurrence": 0.75, "swing": 0.25}
    plan = plan_batches(
        config(max_steps=80), 200, {"co_occurrence": 50, "swing": 60}, shares=shares, seed=0
    )
    assert np.bincount(plan.kinds + 1).tolist() == [40, 30, 10]
    masked = plan_batches(
        config(max_steps=80, mixing="masked"), 200, {"co_occurrence": 50, "swing": 60},
        shares=shares, seed=0,
    )  # fmt: skip
    assert np.bincount(masked.kinds + 1).tolist() == [0, 60, 20]


def reference_loss(
    network: Any, x: torch.Tensor, raw: torch.Tensor | None, scales: torch.Tensor
) -> torch.Tensor:
    """FORGE's step written out: a reconstruction step, or a contrastive one on two halves of x."""
    z = network.encoder(x)
    residual, total, commitment = z.detach(), torch.zeros_like(z), []
    for book in network.codebooks:
        distances = torch.cdist(residual.double(), book.detach().double()).square()
        code = balanced_assignment(distances, iterations=5, sharpness=10.0)
        total = total + book[code]
        residual = residual - book[code].detach()
        commitment.append(
            0.5 * (z - total.detach()).square().mean() + 0.5 * (z.detach() - total).square().mean()
        )
    out = network.decoder(z + (total - z).detach())
    loss = torch.stack(commitment).mean()
    if raw is None:
        return loss + (out - x).square().mean()
    u, v = functional.normalize(out, dim=1).chunk(2)
    a, b = raw.chunk(2)
    own = torch.arange(len(u))
    pairs = ((u @ v.T, v @ u.T), (u @ b.T, v @ a.T), (u @ a.T, v @ b.T))
    terms = [
        (functional.cross_entropy(s * p, own) + functional.cross_entropy(s * q, own)) / 2
        for s, (p, q) in zip(scales.exp(), pairs, strict=True)
    ]
    return loss + sum(terms) / 3


def test_training_equals_forge_written_out() -> None:
    setting = config()
    rng = np.random.default_rng(0)
    vectors = clustered_vectors()
    pairs = TrainingPairs(rng.integers(0, 400, 100), rng.integers(0, 400, 100))
    data = TrainingSet(vectors, pairs={"co_occurrence": pairs})
    ours = RqVae(setting, 16, seed=0)
    plan = ours.plan(data)
    trainer = ours.trainer(plan.total, data_facts(setting, data))
    batches = list(Feed(data, plan).batches(0))

    theirs = RqVae(setting, 16, seed=0).network
    scales = torch.nn.Parameter(torch.full((3,), np.log(1 / 0.07)))
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    plain = [p for p in theirs.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 1e-4}, {"params": [*plain, scales], "weight_decay": 0}]
    )
    for step, batch in enumerate(batches):
        x = torch.from_numpy(batch.vectors)
        loss = reference_loss(theirs, x, x if len(batch.rows.anchor) else None, scales)
        metrics = trainer.advance(batch, measure=False)
        assert abs(float(sum(metrics.values())) - loss.item()) < 1e-4
        for group in optimizer.param_groups:
            group["lr"] = published_rate(step, plan.total)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.network.state_dict()[name], value, atol=1e-5), name


def published_rate(step: int, total: int) -> float:
    warmup = total * 40 / 150
    if step < warmup:
        return 2e-3 * (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    return 1e-7 + (2e-3 - 1e-7) * (1 + np.cos(np.pi * done)) / 2


def test_bf16_trains_and_infers_in_fp32() -> None:
    setting = config(precision="bf16", alignment={"kind": "none"})
    model = RqVae(setting, 16, seed=0)
    seen: list[torch.dtype] = []
    model.network.encoder[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    model.fit(TrainingSet(clustered_vectors()))
    assert set(seen) == {torch.bfloat16}
    model.encode(clustered_vectors(10))
    assert seen[-1] == torch.float32
