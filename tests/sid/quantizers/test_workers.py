"""Two workers train what one trains, whatever is switched on: the same global batches and sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from forge_ray.config import from_mapping
from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import TrainingPairs, TrainingSet
from forge_ray.sid.quantizers.rq_vae import RqVae, RqVaeConfig, data_facts
from forge_ray.sid.quantizers.rq_vae_batches import Feed, check_workers
from forge_ray.sid.quantizers.rq_vae_run import Run, RunHooks
from forge_ray.sid.quantizers.workers import Workers
from tests.contracts.quantizer_contract import clustered_vectors, neighbour_pairs

SMALL: dict[str, Any] = {
    "levels": 2,
    "codebook_size": 8,
    "hidden": [16],
    "latent_dim": 8,
    "batch_size": 64,
    "pair_batch_size": 32,
    "pair_share": 0.5,
    "max_steps": 24,
    "restart_every": 5,
    "lr": 1e-3,
}
PLAIN: dict[str, Any] = {"assignment": {"kind": "nearest"}, "alignment": {"kind": "none"}}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "masked": {"mixing": "masked", "clip_norm": 0.5},
    "gradient codebooks": {"ema": False, "diversity": {"weight": 0.1, "every": 7, "groups": 3}},
    "dead codes": {**PLAIN, "kmeans_init": False},
    "last level balanced": {"assignment": {"kind": "sinkhorn_last"}, "hamr": {"weight": 1.0}},
    "depths and contrast": {
        "random_depth": 1.0,
        "reconstruction": "contrastive",
        "rotation_trick": True,
    },
    "teacher": {"alignment": {"kind": "rlmrec"}, "reconstruction": "cosine"},
    "users": {"alignment": {"kind": "das", "users": {"latent_dim": 8, "codebook_size": 8}}},
}


def small(**changes: Any) -> RqVaeConfig:
    return from_mapping(RqVaeConfig, {**SMALL, **changes})


def data() -> TrainingSet:
    rng = np.random.default_rng(5)
    pairs = neighbour_pairs()
    events = TrainingPairs(
        pairs.anchor,
        pairs.positive,
        user=rng.integers(0, 50, len(pairs)),
        user_positive=rng.integers(0, 50, len(pairs)),
    )
    return TrainingSet(
        clustered_vectors(),
        pairs={"co_occurrence": pairs, "interactions": events},
        teachers={"teacher": rng.normal(size=(400, 8)).astype(np.float32)},
        users=rng.normal(size=(50, 12)).astype(np.float32),
        user_teachers={"teacher": rng.normal(size=(50, 8)).astype(np.float32)},
    )


def trained(config: RqVaeConfig, workers: Workers) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Weights and loss curve of one worker's run."""
    curve: list[Any] = []
    whole = data()
    model = RqVae(config, 16, seed=0)
    model.prepare(whole)
    plan = model.plan(whole)
    check_workers(plan, workers.size)
    trainer = model.trainer(plan.total, data_facts(config, whole), workers)
    run = Run(trainer, RunHooks(report=lambda step, row: curve.append((step, dict(row)))))
    trainer.start(model.start_rows(whole))
    run.finish(Feed(whole, plan, workers.rank, workers.size).batches(0))
    return model.network.state_dict(), curve


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {name: trained(small(**case), Workers.current()) for name, case in CASES.items()}
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes ends with, case by case."""
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(_worker, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder, f"rank-{rank}.pt")) for rank in range(2)]


@pytest.mark.parametrize("name", list(CASES))
def test_two_workers_equal_one(two_workers: list[dict[str, Any]], name: str) -> None:
    weights, curve = trained(small(**CASES[name]), Workers())
    for rank, results in enumerate(two_workers):
        found, found_curve = results[name]
        for key, value in weights.items():
            assert torch.allclose(found[key], value, rtol=1e-4, atol=2e-5), (rank, key)
        assert [step for step, _ in found_curve] == [step for step, _ in curve]
        for (_, row), (_, other) in zip(curve, found_curve, strict=True):
            assert row.keys() == other.keys()
            assert np.allclose(list(row.values()), list(other.values()), rtol=1e-3, atol=1e-5)


def test_workers_agree_bit_by_bit(two_workers: list[dict[str, Any]]) -> None:
    for name in CASES:
        first, second = (results[name][0] for results in two_workers)
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    model = RqVae(small(batch_size=63), 16, seed=0)
    with pytest.raises(ConfigError, match=r"train\.workers must divide the 63 rows"):
        check_workers(model.plan(data()), 2)
