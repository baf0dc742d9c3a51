"""Parallel heads beyond the contract: every field counts, and evaluation ranks all items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from forge_ray.config import load_config
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.gr.config import GrConfig
from forge_ray.gr.evaluation import evaluate_generator
from forge_ray.gr.models.base import TokenBatch
from forge_ray.gr.models.parallel_heads import ParallelHeads, ParallelHeadsConfig
from forge_ray.gr.vocab import vocab_of
from forge_ray.sid.table import SidTable
from tests.gr.generators import random_codes

SIZES = (7, 5, 6)
SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 48}


def make(**changes: Any) -> ParallelHeads:
    """A model whose blocks say more than fresh ones do."""
    torch.manual_seed(0)
    model = ParallelHeadsConfig(**{**SMALL, "dropout": 0.0, **changes}).build(vocab_of(SIZES))
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight.mul_(8.0 if weight.dim() == 2 else 1.0)
    return model


def loss(model: ParallelHeads) -> float:
    """Training loss on fixed rows, with dropout drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(1)
    codes = torch.stack([torch.randint(size, (6, 5), generator=draw) for size in SIZES], dim=2)
    torch.manual_seed(2)
    return model.train().loss(TokenBatch(codes, torch.tensor([5, 2, 3, 5, 4, 2]))).item()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_layers": 2},
        {"num_heads": 4},
        {"intermediate_size": 64},
        {"temperature": 0.2},
        {"dropout": 0.5},
        {"softmax": "full"},
        {"label_smoothing": 0.3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_changes_the_loss(change: dict[str, Any]) -> None:
    assert abs(loss(make(**change)) - loss(make())) > 1e-4


def test_attention_names_the_kernel() -> None:
    for kernel in ("sdpa", "eager"):
        assert make(attention=kernel).blocks.config._attn_implementation == kernel


def test_bad_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.temperature must be > 0, got 0"):
        ParallelHeadsConfig(temperature=0.0)
    with pytest.raises(ConfigError, match=r"model\.hidden_size must be an even multiple"):
        ParallelHeadsConfig(hidden_size=100, num_heads=3)


def test_training_finds_the_kind() -> None:
    config = load_config(GrConfig, overrides=["model.kind=parallel_heads", "model.num_layers=3"])
    assert isinstance(config.model, ParallelHeadsConfig)
    assert config.model.num_layers == 3
    assert config.plan.mode == "window"


@torch.no_grad()
def test_evaluation_equals_sorting_all_items() -> None:
    """One item per SID, history items left out: hits and places by brute force."""
    codes = np.unique(random_codes(150, SIZES), axis=0)
    table = SidTable.from_codes(codes, SIZES)
    model = make().eval()
    rng = np.random.default_rng(0)
    lists = [rng.permutation(len(codes))[: n + 1] for n in rng.integers(0, 9, 60)]
    histories = Ragged.from_lists([row[:-1] for row in lists], np.int64)
    targets = Ragged.from_lists([row[-1:] for row in lists], np.int64)
    found = evaluate_generator(
        model, table, histories, targets,
        train_counts=np.ones(len(codes), np.int64), max_history=20, ks=[5, 20],
    )  # fmt: skip
    tokens, mask = vocab_of(SIZES).history_tokens(histories, codes, 20)
    probs = [level.log_softmax(1) for level in model.level_logits(tokens, mask)]
    scores = sum(probs[level][:, torch.from_numpy(codes[:, level]).long()] for level in range(3))
    for user, row in enumerate(lists):
        scores[user, row[:-1]] = -torch.inf
    place = [int((scores[user] > scores[user, row[-1]]).sum()) for user, row in enumerate(lists)]
    for k in (5, 20):
        assert found[f"ItemHit@{k}"] == pytest.approx(np.mean(np.array(place) < k))
    gains = [1 / np.log2(at + 2) if at < 20 else 0.0 for at in place]
    assert found["ItemNDCG@20"] == pytest.approx(np.mean(gains))
