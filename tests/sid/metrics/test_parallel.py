"""The parallel probe: ranks by brute force, no look ahead, and what it learns from behaviour."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics import parallel_ranking
from forge_ray.sid.metrics.config import ParallelConfig
from forge_ray.sid.metrics.parallel import ParallelHeads, parallel_probe
from forge_ray.sid.metrics.parallel_data import ParallelData
from forge_ray.sid.metrics.parallel_ranking import Catalogue, rank_targets

SIZES = [3, 4]
SMALL = ParallelConfig(steps=60, width=16, heads=2, history=6, batch_users=64)


def brute_force(
    scores: np.ndarray, codes: np.ndarray, seen: set[int], target: int, k: int
) -> tuple[float, float, float]:
    """ItemHit, ItemNDCG and bits of one target by sorting all items."""
    own = [item for item in range(len(codes)) if (codes[item] == codes[target]).all()]
    listed = [item for item in range(len(codes)) if item not in seen or item == target]
    ahead = sum(scores[item] > scores[target] for item in listed)
    tied = sum(item in own for item in listed)
    places = range(min(tied, max(0, k - ahead)))
    hit = len(places) / tied
    ndcg = sum(1 / np.log2(ahead + place + 2) for place in places) / tied
    sids = {tuple(codes[item]): float(np.exp(scores[item])) for item in range(len(codes))}
    bits = -np.log2(sids[tuple(codes[target])] / sum(sids.values()) / len(own))
    return hit, ndcg, bits


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=40)
def test_ranks_equal_brute_force(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, 15) for size in SIZES], axis=1)
    histories = [rng.integers(0, 15, size=rng.integers(0, 5)).tolist() for _ in range(4)]
    targets = [rng.integers(0, 15, size=rng.integers(1, 3)).tolist() for _ in range(4)]
    levels = [
        torch.from_numpy(rng.normal(size=(4, size)).astype(np.float32)).log_softmax(1)
        for size in SIZES
    ]
    with mock.patch.object(parallel_ranking, "_SIDS", 4):
        found = rank_targets(
            levels,
            Catalogue.of(codes, SIZES, "cpu"),
            Ragged.from_lists(histories, dtype=np.int64),
            Ragged.from_lists(targets, dtype=np.int64),
        )
    want = [
        brute_force(
            (levels[0][user, codes[:, 0]] + levels[1][user, codes[:, 1]]).numpy(),
            codes, set(histories[user]), target, k,
        )
        for user in range(4)
        for target in targets[user]
    ]  # fmt: skip
    hit, ndcg, bits = np.array(want).T
    assert found.item_hit(k) == pytest.approx(hit)
    assert found.item_ndcg(k) == pytest.approx(ndcg)
    assert found.bits == pytest.approx(bits, rel=1e-5)


def test_a_place_sees_neither_the_future_nor_the_padding() -> None:
    torch.manual_seed(0)
    model = ParallelHeads(SIZES, SMALL).eval()
    tokens = torch.stack([torch.randint(0, 3, (2, 6)), torch.randint(3, 7, (2, 6))], dim=2)
    states = model(tokens)
    changed = tokens.clone()
    changed[:, 4] = torch.tensor([2, 6])
    assert torch.allclose(model(changed)[:, :4], states[:, :4])
    assert not torch.allclose(model(changed)[:, 5], states[:, 5])
    padded = tokens.clone()
    padded[:, :2] = -1
    assert torch.allclose(model(padded)[:, 2:], model(tokens[:, 2:]), atol=1e-6)
    assert torch.isfinite(model(torch.full((1, 6, 2), -1))).all()


def test_every_level_gets_a_distribution_and_a_gradient() -> None:
    model = ParallelHeads(SIZES, SMALL)
    found = model.log_probabilities(torch.randn(5, 16))
    assert [tuple(level.shape) for level in found] == [(5, 3), (5, 4)]
    for level in found:
        assert level.exp().sum(dim=1).tolist() == pytest.approx([1.0] * 5)
    sum(level[:, 0].sum() for level in found).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in model.outer)


def topics(num_users: int = 300) -> tuple[np.ndarray, ParallelData]:
    """Users stay in one of eight topics, which the first code names."""
    rng = np.random.default_rng(0)
    codes = np.stack([np.arange(160) % 8, np.arange(160) // 8], axis=1)
    rows = rng.integers(0, 20, size=(num_users, 6)) * 8 + rng.integers(0, 8, size=(num_users, 1))
    train, targets = Ragged.from_lists(rows[:, :5]), Ragged.from_lists(rows[:, 5:])
    return codes, ParallelData(train, train, targets)


def test_behaviour_is_learned_and_lost_by_shuffling() -> None:
    codes, data = topics()
    config = replace(SMALL, steps=150)
    own = parallel_probe(codes, [8, 20], data, config)
    shuffled = parallel_probe(np.random.default_rng(1).permutation(codes), [8, 20], data, config)
    # 20 items of a topic: log2 20 = 4.3 bits are the floor, log2 160 = 7.3 say nothing.
    assert own.bits < 5.2
    assert own.item_hit > 0.35
    assert shuffled.bits > own.bits + 1
    assert shuffled.item_hit < own.item_hit / 2
    assert own.num_targets == 300
    assert 0 < own.item_ndcg < own.item_hit


def test_the_seed_decides_and_the_global_state_stays() -> None:
    codes, data = topics(60)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = parallel_probe(codes, [8, 20], data, SMALL, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert parallel_probe(codes, [8, 20], data, SMALL, seed=1) == first
    assert parallel_probe(codes, [8, 20], data, SMALL, seed=2) != first


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0}, {"heads": 3}, {"dropout": 1.0}, {"temperature": 0.0}, {"users": 0},
    ],
)  # fmt: skip
def test_mistakes_are_refused(change: dict[str, float]) -> None:
    if change == {"steps": 0}:
        codes, data = topics(5)
        alone = replace(data, train=data.train.head(1))
        with pytest.raises(ConfigError, match="histories of at least two items"):
            parallel_probe(codes, [8, 20], alone, SMALL)
        return
    with pytest.raises(ConfigError, match=f"score.parallel.{next(iter(change))} must"):
        ParallelConfig(**change)
