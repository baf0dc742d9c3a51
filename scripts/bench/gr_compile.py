"""Training steps with and without `engine.compile`, on batches of amazon-beauty.

Two copies of one model take the same batches in turns, interval by interval, in the bare loop of
`gr_training` (no Ray, no DeepSpeed: both would cost the two sides the same). Rates are useful
tokens per CPU second of this process, first interval left out; `first_step_s` is the wall time of
the first step, which compiles.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.gr_training import DATA, INTERVALS, SIZES, BareLoop, configured

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.prepare import open_or_prepare
from forge_ray.gr.compiling import compile_blocks
from forge_ray.sid.table import SidTable

INTERVAL_STEPS = 20
MODELS = {
    "rq_transformer": ["model.kind=rq_transformer"],
    "decoder, padded": ["model.packing=false", "data.window_batches=64"],
}


def run(scale: float) -> dict[str, Any]:
    """Rates of each model, and what the first step takes."""
    steps = max(4, int(INTERVAL_STEPS * scale))
    with tempfile.TemporaryDirectory() as folder:
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
        dataset = open_or_prepare(DATA, ArtifactStore(Path(folder, "store")))
        ray.shutdown()
        codes = np.random.default_rng(0).integers(256, size=(dataset.num_items, len(SIZES)))
        table = SidTable(codes.astype(np.uint16), SIZES, resolver="")
        return {
            name: compared(
                {side: BareLoop(configured(steps, *given), dataset, table) for side in SIDES}, steps
            )
            for name, given in MODELS.items()
        }


SIDES = ("eager", "compiled")


def compared(loops: dict[str, BareLoop], steps: int) -> dict[str, Any]:
    """Both sides of one model, in turns."""
    compile_blocks(loops["compiled"].model.compilable(), torch.device("cpu"))
    first, losses = {}, {}
    tokens, seconds = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0.0)
    for interval in range(INTERVALS):
        for side in SIDES:
            torch.manual_seed(interval)
            began, wall = time.process_time(), time.perf_counter()
            done = 0
            for number in range(interval * steps, (interval + 1) * steps):
                done += loops[side].step(number)
                first.setdefault(side, round(time.perf_counter() - wall, 1))
            if interval:
                tokens[side] += done
                seconds[side] += time.process_time() - began
            losses[side] = last_loss(loops[side], (interval + 1) * steps - 1)
    rates = {side: tokens[side] / seconds[side] for side in SIDES}
    return {
        "tokens_per_cpu_s": {side: round(rate, 1) for side, rate in rates.items()},
        "compiled_over_eager": round(rates["compiled"] / rates["eager"], 2),
        "first_step_s": first,
        "last_loss": losses,
    }


def last_loss(loop: BareLoop, number: int) -> float:
    """Loss per token of a batch under the weights as they are, dropout off."""
    batch = loop.batches[number]
    loop.model.eval()
    with torch.no_grad():
        loss = float(loop.model(batch)) / loop.model.num_targets(batch.lengths)
    loop.model.train()
    return round(loss, 5)
