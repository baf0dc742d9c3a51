"""One worker of a process group that trains, saves or resumes a tiny model; started by a test.

Usage: python -m tests.gr.engine_worlds RANK WORLD STORE FOLDER STAGE PRECISION FIRST LAST FROM

Trains steps FIRST..LAST and saves to FOLDER; FROM > 0 first loads what that many workers saved.
Rank 0 prints the losses of all workers together as JSON, and a sum over the weights it loaded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed

from forge_ray.gr.engine import Engine, EngineConfig
from forge_ray.gr.models.base import TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.vocab import Vocab

VOCAB = Vocab((8, 8))


def main(words: list[str]) -> None:
    rank, world, store, folder, stage, precision, first, last, saved = words
    os.environ["LOCAL_RANK"] = rank
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world)
    )
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
    engine = Engine(model.build(VOCAB), config, max_steps=20, seed=0)
    start = 0.0
    if int(saved):
        engine.load(Path(folder), world_size=int(saved))
    start = sum(value.abs().sum().item() for value in engine.full_state().values())
    losses = []
    for step in range(int(first), int(last) + 1):
        draw = torch.Generator().manual_seed(step)
        codes = torch.randint(8, (8, 5, 2), generator=draw)
        lengths = torch.randint(1, 6, (8,), generator=draw)
        mine = TokenBatch(codes[int(rank) :: int(world)], lengths[int(rank) :: int(world)])
        targets = engine.module.num_targets(lengths)
        loss = engine.step([mine], num_targets=targets, step=step)
        losses += engine.sum_over_workers([loss.item()])
    end = sum(value.abs().sum().item() for value in engine.full_state().values())
    engine.save(Path(folder))
    engine.barrier()
    if int(rank) == 0:
        sys.stdout.write(json.dumps({"losses": losses, "start": start, "end": end}) + "\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
