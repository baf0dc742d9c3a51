"""One worker of a process group that trains, saves or resumes tiny models; started by a test.

Usage: python -m tests.gr.engine_worlds RANK WORLD STORE FOLDER FIRST LAST FROM CASE...

A case is a ZeRO stage and a precision, as in `2-bf16`. For each one it trains steps FIRST..LAST and
saves to FOLDER/CASE; FROM > 0 first loads what that many workers saved. Rank 0 prints, as JSON by
case, the losses of all workers together and sums over the weights before and after.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from forge_ray.gr.engine import Engine, EngineConfig
from forge_ray.gr.models.base import TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.vocab import Vocab

VOCAB = Vocab((8, 8))


def main(words: list[str]) -> None:
    rank, world, store, folder, first, last, saved, *cases = words
    os.environ["LOCAL_RANK"] = rank
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world)
    )
    steps = range(int(first), int(last) + 1)
    results = {case: train(case, Path(folder, case), steps, int(saved)) for case in cases}
    if rank == "0":
        sys.stdout.write(json.dumps(results) + "\n")
    distributed.destroy_process_group()


def train(case: str, folder: Path, steps: range, saved: int) -> dict[str, Any]:
    """One case; this worker's share of the batches is every `world`-th row."""
    engine = make_engine(case)
    if saved:
        engine.load(folder, world_size=saved)
    start = weight_sum(engine)
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        codes = torch.randint(8, (8, 5, 2), generator=draw)
        lengths = torch.randint(1, 6, (8,), generator=draw)
        rows = slice(engine.rank, None, engine.world_size)
        targets = engine.module.num_targets(lengths)
        loss = engine.step([TokenBatch(codes[rows], lengths[rows])], num_targets=targets, step=step)
        losses += engine.sum_over_workers([loss.item()])
    end = weight_sum(engine)
    engine.save(folder)
    engine.barrier()
    return {"losses": losses, "start": start, "end": end}


def make_engine(case: str) -> Engine:
    """The same fresh model on every worker."""
    stage, precision = case.split("-")
    torch.manual_seed(0)
    model = DecoderConfig(
        hidden_size=32, num_layers=2, num_heads=2, intermediate_size=32, dropout=0.0
    )
    config = EngineConfig(
        global_batch=8,
        warmup_steps=2,
        learning_rate=1e-2,
        zero_stage=int(stage),
        precision=precision,  # type: ignore[arg-type]
    )
    return Engine(model.build(VOCAB), config, max_steps=20, seed=0)


def weight_sum(engine: Engine) -> float:
    """Sum of magnitudes; every worker calls it."""
    return sum(value.abs().sum().item() for value in engine.full_state().values())


if __name__ == "__main__":
    main(sys.argv[1:])
