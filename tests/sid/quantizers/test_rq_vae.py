"""The RQ-VAE keeps the quantizer contract, and each of its switches does something."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from forge_ray.config import from_mapping, load_config
from forge_ray.errors import ConfigError, DataError, TrainingError
from forge_ray.sid.quantizers.base import Quantizer, TrainingSet
from forge_ray.sid.quantizers.rq_vae import RqVae, RqVaeConfig
from forge_ray.sid.quantizers.rq_vae_batches import num_steps
from forge_ray.sid.quantizers.rq_vae_network import quantize
from forge_ray.sid.quantizers.rq_vae_training import learning_rate
from tests.contracts.quantizer_contract import (
    ResidualContract,
    clustered_vectors,
    neighbour_pairs,
    training_set,
)

SMALL: dict[str, Any] = {
    "pair_share": 0.5,
    "levels": 2,
    "codebook_size": 16,
    "hidden": [32],
    "latent_dim": 8,
    "batch_size": 128,
    "pair_batch_size": 64,
    "max_steps": 120,
    "restart_every": 10,
}


NEAREST = {"kind": "nearest"}
NONE = {"kind": "none"}


def small(**changes: Any) -> RqVaeConfig:
    return from_mapping(RqVaeConfig, {**SMALL, **changes})


def fitted(config: RqVaeConfig, curve: list[dict[str, float]] | None = None) -> Quantizer:
    quantizer = config.build(16, seed=0)
    points = [] if curve is None else curve
    quantizer.fit(
        training_set(clustered_vectors()),
        report=lambda step, metrics: points.append({"step": step, **metrics}),
    )
    return quantizer


class TestRqVae(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> RqVaeConfig:
        return small(max_steps=150, pair_share=0.3)

    @pytest.mark.parametrize("commitment", ["cumulative", "residual"])
    def test_gradients_reach_where_they_should(self, commitment: str) -> None:
        config = small(commitment=commitment, ema=False)
        network = RqVae(config, 16, seed=0).network
        inputs = torch.from_numpy(clustered_vectors(64))
        batch = quantize(network, network.encoder(inputs), config)
        torch.autograd.backward(batch.reconstruction.square().mean())
        assert network.encoder[0].weight.grad.abs().sum() > 0
        assert network.decoder[0].weight.grad.abs().sum() > 0
        # The reconstruction passes straight through; commitment is all that moves the codebooks.
        assert all(book.grad is None for book in network.codebooks)
        batch = quantize(network, network.encoder(inputs), config)
        torch.autograd.backward(batch.commitment)
        assert all(book.grad.abs().sum() > 0 for book in network.codebooks)


def test_commitment_equals_the_published_formula() -> None:
    config = small(assignment=NEAREST, ema=False)
    network = RqVae(config, 16, seed=0).network
    z = network.encoder(torch.from_numpy(clustered_vectors(64))).detach()
    batch = quantize(network, z, config)
    total, residual, expected = torch.zeros_like(z), z, []
    for book in network.codebooks:
        code = torch.cdist(residual, book).argmin(dim=1)
        total, residual = total + book[code], residual - book[code]
        expected.append(0.5 * (z - total).square().mean() + 0.5 * (z - total).square().mean())
    assert torch.allclose(batch.commitment, torch.stack(expected).mean(), atol=1e-6)


LAST = {"kind": "sinkhorn_last"}

# Every field that is not about size or name, with a value other than the small default.
CHANGES: dict[str, Any] = {
    "levels": 3,
    "codebook_size": 8,
    "sizes": [16, 8],
    "hidden": [16],
    "latent_dim": 4,
    "unit_variance": False,
    "commitment": "residual",
    "commitment_loss": "cosine",
    "encoder_commitment": 0.1,
    "codebook_commitment": 0.1,
    "reconstruction": "cosine",
    "reconstruction_temperature": 0.5,
    "rotation_trick": True,
    "random_depth": 0.5,
    "assignment": NEAREST,
    "assignment.iterations": {"iterations": 1},
    "assignment.sharpness": {"sharpness": 2.0},
    "assignment.last": LAST,
    "assignment.last.iterations": {**LAST, "iterations": 1},
    "assignment.last.epsilon": {**LAST, "epsilon": 0.3},
    "kmeans_init": False,
    "kmeans_vectors": 50,
    "dead_code_restart": False,
    "restart_every": 3,
    "ema": False,
    "ema_decay": 0.5,
    "alignment": NONE,
    "diversity": {"weight": 0.1},
    "hamr": {"weight": 1.0},
    "mixing": "masked",
    "pair_share": 0.2,
    "pair_batch_size": 32,
    "batch_size": 64,
    "epochs": 1,
    "max_steps": 60,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "warmup": 0.6,
    "weight_decay": 0.3,
    "clip_norm": 0.01,
    "precision": "bf16",
}
# Fields that act only under another one.
UNDER: dict[str, dict[str, Any]] = {
    "commitment": {"ema": False},
    "codebook_commitment": {"ema": False},
    "diversity": {"ema": False},
    "reconstruction_temperature": {"reconstruction": "contrastive"},
    "assignment.last.iterations": {"assignment": LAST},
    "assignment.last.epsilon": {"assignment": LAST},
    "min_lr": {"warmup": 0.0},
    # Without k-means start and balancing some codes are never chosen, so that restarts happen.
    "dead_code_restart": {"kmeans_init": False, "assignment": NEAREST},
    "restart_every": {"kmeans_init": False, "assignment": NEAREST},
}
# `selection` acts with a measurement: test_the_best_model_is_kept.
ELSEWHERE = {"kind", "max_train_vectors", "selection"}


def test_every_field_is_listed() -> None:
    names = {one.name for one in dataclasses.fields(RqVaeConfig)}
    assert names == {name.split(".")[0] for name in CHANGES} | ELSEWHERE


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_every_switch_changes_the_result(name: str) -> None:
    base = {"max_steps": 40, **UNDER.get(name, {})}
    before = small(**base)
    after = small(**{**base, name.split(".")[0]: CHANGES[name]})
    first, second = fitted(before).state_dict(), fitted(after).state_dict()
    same = first.keys() == second.keys() and all(
        first[key].shape == second[key].shape and np.array_equal(first[key], second[key])
        for key in first
    )
    assert not same


def test_restart_revives_dead_codes() -> None:
    vectors = clustered_vectors()
    used = {}
    for restart in (False, True):
        config = small(
            kmeans_init=False,
            assignment=NEAREST,
            alignment=NONE,
            ema=False,
            dead_code_restart=restart,
        )
        codes = fitted(config).encode(vectors)
        used[restart] = len(np.unique(codes[:, 0]))
    assert used[True] > used[False]


def test_alignment_brings_pairs_together() -> None:
    vectors = clustered_vectors(seed=3)
    # Pairs across centres: content alone would not join them.
    pairs = neighbour_pairs()
    pairs = dataclasses.replace(pairs, positive=(pairs.anchor + 10) % 400)
    shared = {}
    for kind in ("none", "forge_i2i"):
        quantizer = small(alignment={"kind": kind}, max_steps=300).build(16, seed=0)
        quantizer.fit(TrainingSet(vectors, pairs={"co_occurrence": pairs}))
        decoded = quantizer.decode(quantizer.encode(vectors))
        decoded /= np.linalg.norm(decoded, axis=1, keepdims=True)
        shared[kind] = (decoded[pairs.anchor] * decoded[pairs.positive]).sum(axis=1).mean()
    assert shared["forge_i2i"] > shared["none"] + 0.1


def test_decoding_without_alignment_keeps_the_signal() -> None:
    vectors = clustered_vectors()
    quantizer = fitted(small(alignment=NONE, max_steps=200))
    error = np.square(quantizer.decode(quantizer.encode(vectors)) - vectors).sum()
    assert error < 0.6 * np.square(vectors - vectors.mean(0)).sum()


def test_loss_falls_and_the_curve_says_what_happened() -> None:
    curve: list[dict[str, float]] = []
    fitted(small(alignment=NONE, max_steps=200), curve)
    assert curve[-1]["reconstruction"] < 0.7 * curve[0]["reconstruction"]
    assert curve[-1]["step"] == 200
    assert 40 <= len(curve) <= 60
    expected = {"step", "commitment", "codebook_gradient", "latent_gap", "batch_usage_level_2"}
    assert expected <= set(curve[-1])


def test_a_diverging_run_stops() -> None:
    with pytest.raises(TrainingError, match="must stay finite"):
        small(lr=1e30, alignment=NONE).build(16, seed=0).fit(TrainingSet(clustered_vectors()))


def test_alignment_without_pairs_is_refused() -> None:
    with pytest.raises(DataError, match=r"Set quantizer\.alignment\.kind=none"):
        small().build(16, seed=0).fit(TrainingSet(clustered_vectors()))


def test_bad_settings_are_refused() -> None:
    for override, text in {
        "pair_share=1.0": "pair_share must be in",
        "latent_dim=0": "latent_dim must be >= 1",
        "restart_every=0": "restart_every must be >= 1",
        "lr=0": "lr must be > 0",
        "clip_norm=0": "clip_norm must be > 0",
        "random_depth=2": "random_depth must be in",
        "assignment.sharpness=0": r"assignment\.sharpness must be > 0",
        "diversity.weight=0.1": r"Set quantizer\.ema=false",
        "selection.checks=-1": r"selection\.checks must be >= 0",
    }.items():
        with pytest.raises(ConfigError, match=text):
            load_config(RqVaeConfig, overrides=[override])


def test_schedule_warms_up_and_decays() -> None:
    config = small(warmup=0.25, lr=1.0, min_lr=0.0)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates.index(max(rates)) == 25
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[-1] < 0.01


def test_steps_follow_epochs_and_their_bound() -> None:
    config = small(batch_size=100, epochs=3, max_steps=1000)
    assert num_steps(config, 400, has_pairs=False) == 12
    assert num_steps(config, 400, has_pairs=True) == 24
    assert num_steps(small(max_steps=7), 400, has_pairs=True) == 7
