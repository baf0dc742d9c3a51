"""One worker of a process group that trains, saves or resumes tiny models; started by a test.

Usage: python -m tests.gr.engine_worlds RANK WORLD STORE FOLDER FIRST LAST FROM CASE...

A case is a ZeRO stage, a precision and perhaps a model, as in `2-bf16` or `3-fp32-rq_transformer`.
For each one it trains steps FIRST..LAST and saves to FOLDER/CASE; FROM > 0 first loads what that
many workers saved. The rows of a batch do not divide evenly. Rank 0 prints, as JSON by case, the
losses of all workers together, sums over the weights before and after, those of every weight, and
how many weights the other workers held of them.
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
from forge_ray.gr.models import rq_transformer
from forge_ray.gr.models.base import GeneratorConfig, TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.rq_transformer import RqTransformerConfig
from forge_ray.gr.vocab import Vocab

VOCAB = Vocab((8, 8, 8))
ROWS = 7


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
        codes = torch.randint(8, (ROWS, 5, VOCAB.num_levels), generator=draw)
        lengths = torch.randint(1, 6, (ROWS,), generator=draw)
        rows = slice(engine.rank, None, engine.world_size)
        targets = engine.module.num_targets(lengths)
        loss = engine.step([TokenBatch(codes[rows], lengths[rows])], num_targets=targets, step=step)
        losses += engine.sum_over_workers([loss.item()])
    end = weight_sum(engine)
    weights = engine.full_state()
    (others,) = engine.sum_over_workers([len(weights) if engine.rank else 0])
    engine.save(folder)
    engine.barrier()
    by_name = {name: value.abs().sum().item() for name, value in weights.items()}
    return {"losses": losses, "start": start, "end": end, "weights": by_name, "others": others}


def make_engine(case: str) -> Engine:
    """The same fresh model on every worker."""
    stage, precision, kind = [*case.split("-"), "decoder"][:3]
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    models: dict[str, GeneratorConfig] = {
        "decoder": DecoderConfig(**size, dropout=0.0),
        "rq_transformer": RqTransformerConfig(**size, dropout=0.0, prefix_rows=64, child_size=8),
    }
    model = models[kind]
    # Three items at a time: workers score the children of theirs in different numbers of parts.
    rq_transformer._VALUES_AT_ONCE = 3 * 8 * 8
    config = EngineConfig(
        global_batch=ROWS,
        warmup_steps=2,
        learning_rate=1e-2,
        zero_stage=int(stage),
        precision=precision,  # type: ignore[arg-type]
    )
    return Engine(model.build(VOCAB), config, max_steps=20, seed=0)


def weight_sum(engine: Engine) -> float:
    """Sum of magnitudes, on rank 0; every worker calls it."""
    return sum(value.abs().sum().item() for value in engine.full_state().values())


if __name__ == "__main__":
    main(sys.argv[1:])
