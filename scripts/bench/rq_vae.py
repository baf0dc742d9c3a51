"""RQ-VAE training beside a bare torch loop with the same network, batches and losses.

The bare side holds all vectors on the device and does what a step means and nothing else: encode,
assign level by level, decode, losses, AdamW. Ours is `RqVae.train` from a training set in memory:
checks, batches, schedule, metrics and reports included. The sides take turns; the best counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from forge_ray.config import from_mapping
from forge_ray.sid.quantizers.base import TrainingPairs, TrainingSet
from forge_ray.sid.quantizers.rq_vae import RqVae, RqVaeConfig
from forge_ray.sid.quantizers.rq_vae_network import RqVaeNetwork
from forge_ray.sid.quantizers.rq_vae_run import RunHooks

TURNS, ROWS = 3, 20_000
OFF: dict[str, Any] = {"kmeans_init": False, "dead_code_restart": False, "ema": False}
"""FORGE's step and nothing else."""


@dataclass(frozen=True)
class Case:
    """One training to time."""

    dim: int
    codes: int
    batch: int
    steps: int
    assignment: str = "nearest"
    pairs: int = 0
    """Pairs per contrastive step; 0 for reconstruction alone."""

    @property
    def config(self) -> RqVaeConfig:
        """The quantizer that is trained."""
        alignment = {"kind": "none"}
        if self.pairs:
            alignment = {"kind": "forge_i2i", "max_scale": None, "mask_false_negatives": False}
        values = {
            **OFF, "codebook_size": self.codes, "batch_size": self.batch,
            "pair_batch_size": max(1, self.pairs), "max_steps": self.steps,
            "alignment": alignment, "assignment": {"kind": self.assignment}, "pair_share": 0.5,
        }  # fmt: skip
        return from_mapping(RqVaeConfig, values)


CASES = {
    "d384 3x256 nearest": Case(384, 256, 2048, 60),
    "d384 3x256 balanced": Case(384, 256, 2048, 40, assignment="sinkhorn"),
    "d384 3x256 balanced, pairs": Case(384, 256, 2048, 60, assignment="sinkhorn", pairs=512),
    "d512 3x8192 balanced (FORGE)": Case(512, 8192, 2048, 4, assignment="sinkhorn"),
}


def run(scale: float) -> dict[str, Any]:
    """Vectors per second of both sides by case."""
    return {name: compare(case, scale) for name, case in CASES.items()}


def compare(case: Case, scale: float) -> dict[str, Any]:
    """One case."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ROWS, case.dim), dtype=np.float32)
    pairs = TrainingPairs(*rng.integers(0, ROWS, (2, ROWS)))
    data = TrainingSet(vectors, pairs={"co_occurrence": pairs} if case.pairs else {})
    steps = max(2, int(case.steps * scale))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = steps * case.batch if not case.pairs else steps // 2 * (case.batch + 2 * case.pairs)

    def ours() -> None:
        model = RqVae(case.config, case.dim, seed=0).to(device)
        model.config.max_steps = steps
        model.train(data, RunHooks())

    sides = (ours, lambda: bare(case, data, steps, device))
    seconds = best_turns(sides)
    return {
        "batch": case.batch,
        "steps": steps,
        "vectors_per_second": round(rows / seconds[0]),
        "bare_vectors_per_second": round(rows / seconds[1]),
        "ratio": round(seconds[1] / seconds[0], 2),
    }


def bare(case: Case, data: TrainingSet, steps: int, device: str) -> None:
    """The loop that anyone would write."""
    torch.manual_seed(0)
    network = RqVaeNetwork(case.config, case.dim).to(device)
    scales = torch.nn.Parameter(torch.full((3,), np.log(1 / 0.07), device=device))
    optimizer = torch.optim.AdamW([*network.parameters(), scales], lr=1e-3, weight_decay=1e-4)
    vectors = torch.from_numpy(data.vectors).to(device)
    for step in range(steps):
        is_pair = bool(case.pairs) and step % 2 == 1
        if is_pair:
            at = torch.randint(ROWS, (case.pairs,)).numpy()
            ends = data.pairs["co_occurrence"]
            rows = torch.from_numpy(np.concatenate([ends.anchor[at], ends.positive[at]]))
        else:
            rows = torch.randint(ROWS, (case.batch,))
        x = vectors[rows.to(device)]
        out, commitment = bare_pass(network, x, balanced=case.assignment == "sinkhorn")
        loss = bare_contrast(out, x, scales) if is_pair else functional.mse_loss(out, x)
        optimizer.zero_grad()
        (loss + commitment).backward()
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()


def bare_pass(
    network: RqVaeNetwork, x: torch.Tensor, *, balanced: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoder output and commitment."""
    z = network.encoder(x)
    residual, total, losses = z.detach(), torch.zeros_like(z), []
    for book in network.codebooks:
        squares = residual.square().sum(1, keepdim=True) + book.detach().square().sum(1)
        distances = torch.addmm(squares, residual, book.detach().T, alpha=-2)
        word = book[bare_balance(distances) if balanced else distances.argmin(1)]
        total, residual = total + word, residual - word.detach()
        losses.append(
            0.5 * functional.mse_loss(z, total.detach())
            + 0.5 * functional.mse_loss(total, z.detach())
        )
    return network.decoder(z + (total - z).detach()), torch.stack(losses).mean()


def bare_balance(distances: torch.Tensor) -> torch.Tensor:
    """FORGE's assignment."""
    distances = (distances - distances.mean()) / (distances.std() + 1e-6)
    plan = torch.exp(-10 * (distances - distances.min()).double())
    plan /= plan.sum() + 1e-8
    for _ in range(5):
        plan /= (plan.sum(0, keepdim=True) + 1e-8) * plan.shape[1]
        plan /= (plan.sum(1, keepdim=True) + 1e-8) * plan.shape[0]
    return plan.argmax(1)


def bare_contrast(out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """FORGE's three terms, inputs normalised as ours are by default."""
    u, v = functional.normalize(out, dim=1).chunk(2)
    a, b = functional.normalize(x, dim=1).chunk(2)
    own = torch.arange(len(u), device=u.device)
    terms = ((u @ v.T, v @ u.T), (u @ b.T, v @ a.T), (u @ a.T, v @ b.T))
    losses = [
        functional.cross_entropy(scale * logits, own)
        for scale, pair in zip(scales.exp(), terms, strict=True)
        for logits in pair
    ]
    return torch.stack(losses).mean()


def best_turns(sides: tuple[Callable[[], Any], Callable[[], Any]]) -> list[float]:
    """Fewest seconds of each side over alternating turns, after one to warm up."""
    seconds: list[list[float]] = [[], []]
    for _ in range(TURNS + 1):
        for side, work in enumerate(sides):
            start = time.perf_counter()
            work()
            seconds[side].append(time.perf_counter() - start)
    return [min(one[1:]) for one in seconds]
