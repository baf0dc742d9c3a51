"""The user side: residual codes, its loss by a loop, and a start that all workers share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.sid.alignment.batch import alone
from forge_ray.sid.alignment.users import UserTokenizer, UserTokenizerConfig
from forge_ray.sid.quantizers.base import TrainingPairs, TrainingSet
from forge_ray.sid.quantizers.rq_vae import RqVaeConfig
from forge_ray.sid.quantizers.rq_vae_codebooks import RunningMeans
from forge_ray.sid.quantizers.workers import Workers

CONFIG = UserTokenizerConfig(levels=3, codebook_size=6, latent_dim=4, hidden=[8])


def build(config: UserTokenizerConfig = CONFIG, seed: int = 0) -> UserTokenizer:
    torch.manual_seed(seed)
    return UserTokenizer(config, 5).double()


def users(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(count, 5, generator=generator, dtype=torch.float64)


def test_codes_and_loss_equal_a_plain_loop() -> None:
    module, inputs = build(), users(20)
    coded = module(inputs, gather=alone)
    scaled = inputs / module.scale
    assert scaled.square().mean().item() == pytest.approx(1.0)
    latents = module.encoder(scaled).detach().numpy()
    books = [book.detach().numpy() for book in module.codebooks]
    losses, sums = [[] for _ in books], []
    for row, latent in enumerate(latents):
        residual = latent.copy()
        for level, book in enumerate(books):
            code = min(range(len(book)), key=lambda k: float(np.sum((residual - book[k]) ** 2)))
            assert code == coded.codes[level][row]
            assert np.allclose(residual, coded.residuals[level][row])
            losses[level].append(0.25 * float(np.mean((residual - book[code]) ** 2)))
            residual = residual - book[code]
        sums.append(latent - residual)
    assert np.allclose(coded.quantized.detach().numpy(), sums)
    decoded = module.decoder(torch.from_numpy(np.array(sums))).detach()
    expected = float(torch.mean((decoded - scaled) ** 2)) + float(np.mean(losses))
    assert coded.loss.item() == pytest.approx(expected)


def test_gradients_pass_the_codebooks() -> None:
    module, inputs = build(), users(20)
    coded = module(inputs, gather=alone)
    torch.autograd.backward(coded.quantized.sum())
    assert all(p.grad is not None and p.grad.any() for p in module.encoder.parameters())
    assert all(book.grad is None for book in module.codebooks)
    torch.autograd.backward(module(inputs, gather=alone).loss)
    assert all(p.grad is not None and p.grad.any() for p in module.decoder.parameters())
    assert all(book.grad is None for book in module.codebooks)


def test_codebooks_start_on_the_first_batch_once() -> None:
    module = build()
    module(users(20), gather=alone)
    first = [book.detach().clone() for book in module.codebooks]
    module(users(20, seed=1), gather=alone)
    assert all(torch.equal(a, b) for a, b in zip(first, module.codebooks, strict=True))
    resumed = build(seed=9)
    resumed.load_state_dict(module.state_dict())
    again, before = (m(users(20, seed=2), gather=alone) for m in (resumed, module))
    assert all(torch.equal(a, b) for a, b in zip(again.codes, before.codes, strict=True))
    assert torch.equal(again.loss, before.loss)


def test_a_batch_smaller_than_a_codebook_still_gives_different_codewords() -> None:
    module = build(UserTokenizerConfig(levels=1, codebook_size=12, latent_dim=4, hidden=[]))
    module(users(5), gather=alone)
    assert len(torch.unique(module.codebooks[0].detach(), dim=0)) == 12


def test_training_fits_users() -> None:
    losses = train(CONFIG)
    assert losses[-1] < 0.5 * losses[0]
    assert losses != train(replace(CONFIG, ema_decay=0.5))


def train(config: UserTokenizerConfig) -> list[float]:
    """Losses of some steps with running codebooks."""
    module, inputs = build(config).float(), users(64).float()
    means = RunningMeans(list(module.codebooks), config.ema_decay, Workers())
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        coded = module(inputs, gather=alone)
        optimizer.zero_grad()
        torch.autograd.backward(coded.loss)
        optimizer.step()
        means.update(coded)
        losses.append(coded.loss.item())
    return losses


def test_codebooks_keep_up_with_what_the_views_ask_of_the_latents() -> None:
    # The default rate, at which latents once left gradient-trained codebooks behind: 1 -> 30.
    rng = np.random.default_rng(0)
    num_items, num_users, width, taste = 600, 500, 32, 64
    cluster, liking = np.arange(num_items) % 20, np.arange(num_users) % 20
    centres, tastes = rng.normal(size=(20, width)), rng.normal(size=(20, taste))
    anchor = rng.permutation(np.repeat(np.arange(num_items), 5))
    user = cluster[anchor] + 20 * rng.integers(0, 25, len(anchor))
    pairs = TrainingPairs(
        anchor,
        (anchor + 20 * rng.integers(1, 30, len(anchor))) % num_items,
        user=user,
        user_positive=(user + 20) % num_users,
    )
    data = TrainingSet(
        (centres[cluster] + 0.5 * rng.normal(size=(num_items, width))).astype(np.float32),
        pairs={"interactions": pairs},
        teachers={"teacher": tastes[cluster].astype(np.float32)},
        users=(centres[liking] + 0.3 * rng.normal(size=(num_users, width))).astype(np.float32),
        user_teachers={"teacher": tastes[liking].astype(np.float32)},
    )
    overrides = ["alignment.kind=das", "codebook_size=64", "max_steps=75", "pair_batch_size=256"]
    config = load_config(RqVaeConfig, overrides=[*overrides, "batch_size=256"])
    curve: list[float] = []
    config.build(width, seed=0).fit(
        data, report=lambda _, row: curve.extend([row["users"]] if "users" in row else [])
    )
    assert len(curve) == 60
    assert max(curve) < 1.5 * curve[0]
    assert curve[-1] < 0.5 * curve[0]


@pytest.mark.parametrize(
    "fields",
    [{"levels": 0}, {"codebook_size": 1}, {"latent_dim": 0}, {"weight": -1.0}, {"ema_decay": 1.0}],
)
def test_values_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"users.{next(iter(fields))}"):
        UserTokenizerConfig(**fields)
