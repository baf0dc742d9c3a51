"""The same losses and gradients from two real processes with gloo as from one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from forge_ray.sid.alignment import AlignmentConfig, AlignmentDims, DasConfig, ForgeI2iConfig
from forge_ray.sid.alignment.hamr import HamrConfig, hamming_margin
from forge_ray.sid.alignment.recon import reconstruction_loss
from forge_ray.sid.alignment.users import UserTokenizerConfig
from forge_ray.sid.quantizers.workers import Workers
from tests.sid.alignment.batches import (
    INPUTS,
    LATENTS,
    MIDDLE,
    TEACHER,
    USERS,
    random_batch,
    share_of,
)

DIMS = AlignmentDims(
    inputs=INPUTS, latents=LATENTS, middle=MIDDLE, teachers={"teacher": TEACHER}, users=USERS
)
SIDE = UserTokenizerConfig(levels=2, codebook_size=4, latent_dim=LATENTS, hidden=[5])
CASES: dict[str, tuple[AlignmentConfig, str]] = {
    "forge_i2i": (ForgeI2iConfig(), "co_occurrence"),
    "das": (DasConfig(users=SIDE), "interactions"),
}


def gradients(case: str, workers: Workers) -> dict[str, torch.Tensor]:
    """Parameters' and rows' gradients of one step of one worker, averaged over workers."""
    config, source = CASES[case]
    torch.manual_seed(0)
    module = config.build(DIMS).double()
    # Stands for the network that all rows come from.
    network = torch.nn.Parameter(torch.ones(INPUTS, dtype=torch.float64))
    latent = torch.nn.Parameter(torch.ones(LATENTS, dtype=torch.float64))
    batch = share_of(random_batch(source, 12), workers.rank, workers.size)
    views = [
        replace(
            view,
            reconstruction=view.reconstruction * network,
            quantized=view.quantized * latent,
            latents=view.latents * latent,
        )
        for view in (batch.anchor, batch.positive)
    ]
    batch = replace(batch, anchor=views[0], positive=views[1], gather=workers.gather)
    losses = list(module(batch).values())
    anchor = batch.anchor
    losses.append(
        hamming_margin(
            HamrConfig(weight=1.0),
            anchor.latents,
            anchor.codes,
            anchor.items,
            known=batch.known,
            gather=workers.gather,
        )
    )
    losses.append(
        reconstruction_loss(
            "contrastive",
            anchor.reconstruction,
            anchor.inputs,
            gather=workers.gather,
            rank=workers.rank,
        )
    )
    torch.autograd.backward(torch.stack(losses).sum())
    parameters = {"network": network, "latent": latent, **dict(module.named_parameters())}
    workers.average_gradients(parameters.values())
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {case: gradients(case, Workers.current()) for case in CASES}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    # One start for all cases: two interpreters that import torch take seconds.
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    together = torch.load(tmp_path / "found.pt")
    for case in CASES:
        alone = gradients(case, Workers())
        assert alone.keys() == together[case].keys()
        assert all(value.abs().max() > 1e-9 for value in alone.values())
        for name, value in alone.items():
            assert torch.allclose(together[case][name], value, atol=1e-12), (case, name)
