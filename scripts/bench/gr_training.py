"""Training beside a bare torch loop, and packed rows beside padded ones, on amazon-beauty.

One model: the default decoder (4 layers, width 128) over random codes, 3 x 256, histories of at
most 50 items. `ours` is the real path: shards, Ray Data, Ray Train, DeepSpeed. `bare` is a loop of
AdamW, clipping and the same schedule over the very same batches, made into tensors beforehand. Both
are timed over the same intervals of steps, first interval left out; the medians are compared, as
tokens differ between intervals. Both sides have the same threads; the reading task of Ray Data has
a core of its own only where `--threads` leaves one.

Packed and padded rows are timed in the bare loop by CPU seconds of this process, which on a busy
machine stay comparable. Useful tokens are codes of items, not padding; `padded` takes rows in
random order, `sorted` the order that forge-ray gives to models that pad (neighbours in length).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.data.examples import segment_rows
from forge_ray.data.prepare import open_or_prepare
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.data.stream import epoch_segments, read_sequences
from forge_ray.gr.batches import micro_batches
from forge_ray.gr.config import GrConfig
from forge_ray.gr.models.base import Generator, TokenBatch
from forge_ray.gr.train import train_generator
from forge_ray.gr.vocab import vocab_of
from forge_ray.sid.table import SidTable

DATA = Path(__file__).parents[3] / "shared" / "data" / "amazon-beauty"
SIZES, MAX_HISTORY, BATCH_ROWS = (256, 256, 256), 50, 64
INTERVALS, INTERVAL_STEPS = 4, 60
WAYS = {
    "packed": ["model.packing=true", "data.window_batches=1"],
    "padded": ["model.packing=false", "data.window_batches=1"],
    "sorted": ["model.packing=false", "data.window_batches=64"],
}


def run(scale: float) -> dict[str, Any]:
    """Tokens per second of the real path and the bare loop, then of the three ways to batch."""
    steps = max(10, int(INTERVAL_STEPS * scale))
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(Path(folder, "store"))
        ray_starts(torch.get_num_threads())
        dataset = open_or_prepare(DATA, store)
        codes = np.random.default_rng(0).integers(256, size=(dataset.num_items, len(SIZES)))
        table = SidTable(codes.astype(np.uint16), SIZES, resolver="")
        config = configured(steps)
        ours = real_path(config, dataset, table, store)
        loops = {
            name: BareLoop(configured(steps, *ways), dataset, table) for name, ways in WAYS.items()
        }
    ray_ends()
    wall = loops["packed"].rates(steps, time.perf_counter)
    return {
        "ours": ours,
        "bare_tokens_per_s": wall,
        "ours_over_bare": round(
            statistics.median(ours["tokens_per_s"]) / statistics.median(wall), 3
        ),
        **by_way(loops, steps),
    }


def configured(steps: int, *overrides: str) -> GrConfig:
    """The run's configuration: a validation point ends every interval and costs next to nothing."""
    return load_config(
        GrConfig,
        overrides=[
            f"max_history={MAX_HISTORY}",
            f"engine.global_batch={BATCH_ROWS}",
            f"max_steps={INTERVALS * steps}",
            f"validation.every={steps}",
            "validation.users=1",
            "validation.ks=[10]",
            "validation.aside=false",
            f"cpus_per_worker={torch.get_num_threads()}",
            *overrides,
        ],
    )


def ray_starts(threads: int) -> None:
    """A Ray of this process alone, with a CPU more than the training has threads."""
    import ray

    ray.init(address="local", num_cpus=threads + 1, include_dashboard=False, logging_level="error")


def ray_ends() -> None:
    """Stops it."""
    import ray

    ray.shutdown()


def real_path(
    config: GrConfig, dataset: Dataset, table: SidTable, store: ArtifactStore
) -> dict[str, Any]:
    """What users run."""
    result = train_generator(
        config, dataset, table, store=store, run_dir=f"{store.root}-runs", name="bench"
    )
    rows = result.history[1:]
    return {
        "tokens_per_s": [row["tokens_per_s"] for row in rows],
        "input_wait_share": [row["input_wait_share"] for row in rows],
        "startup_s": rows[-1]["startup_s"],
    }


class BareLoop:
    """A model, its optimiser and pre-materialised batches of one configuration."""

    model: Generator
    batches: list[TokenBatch]

    def __init__(self, config: GrConfig, dataset: Dataset, table: SidTable) -> None:
        torch.manual_seed(config.seed)
        self.engine = config.engine
        self.max_steps = config.max_steps
        self.model = config.model.build(vocab_of(table.codebook_sizes)).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.engine.learning_rate,
            betas=(0.9, config.engine.beta2),
            weight_decay=config.engine.weight_decay,
            fused=True,
        )
        self.batches = [
            micro_batches(rows, table.codes, 1, is_packed=config.model.packs)[0]
            for rows in islice(stream_rows(config, dataset), config.max_steps)
        ]

    def rates(self, steps: int, clock: Callable[[], float]) -> list[float]:
        """Useful tokens per second of every interval but the first."""
        found = []
        for first in range(0, self.max_steps, steps):
            began = clock()
            tokens = sum(self.step(number) for number in range(first, first + steps))
            found.append(round(tokens / (clock() - began), 1))
        return found[1:]

    def step(self, number: int) -> int:
        """One step; its target tokens."""
        batch = self.batches[number]
        tokens = self.model.num_targets(batch.lengths)
        for group in self.optimizer.param_groups:
            group["lr"] = self.engine.learning_rate_at(number + 1, self.max_steps)
        loss = self.model(batch) / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.engine.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return tokens


def stream_rows(config: GrConfig, dataset: Dataset) -> Iterator[Ragged]:
    """Rows of every global batch, in the order of the stream."""
    plan, files = config.plan, sorted(dataset.sequence_files("train"))
    for epoch in count():
        segments = epoch_segments(
            len(files), config.data.segment_files, seed=plan.seed, epoch=epoch
        )
        for number, segment in enumerate(segments):
            sequences = read_sequences([files[index] for index in segment], dataset.filesystem)
            rows, batches = segment_rows(sequences, plan, epoch=epoch, segment=number)
            yield from (rows.take(batch) for batch in batches)


def by_way(loops: dict[str, BareLoop], steps: int) -> dict[str, Any]:
    """Useful tokens per CPU second of each way to batch, and the share of cells that are padding.

    The ways take turns interval by interval, so that a change of the machine meets all of them.
    """
    tokens, seconds = dict.fromkeys(loops, 0), dict.fromkeys(loops, 0.0)
    for first in range(0, INTERVALS * steps, steps):
        for name, loop in loops.items():
            began = time.process_time()
            done = sum(loop.step(number) for number in range(first, first + steps))
            if first:
                tokens[name] += done
                seconds[name] += time.process_time() - began
    rates = {name: tokens[name] / seconds[name] for name in loops}
    return {
        "useful_tokens_per_cpu_s": {name: round(one, 1) for name, one in rates.items()},
        "useful_tokens_per_step": {
            name: tokens[name] // ((INTERVALS - 1) * steps) for name in loops
        },
        "padding_share": {
            name: round(1 - useful(loop) / cells(loop), 3)
            for name, loop in loops.items()
            if name != "packed"
        },
        "packed_over_padded": round(rates["packed"] / rates["padded"], 2),
        "packed_over_sorted": round(rates["packed"] / rates["sorted"], 2),
    }


def useful(loop: BareLoop) -> int:
    """Items in all batches."""
    return sum(int(batch.lengths.sum()) for batch in loop.batches)


def cells(loop: BareLoop) -> int:
    """Places for items in all batches when they are padded."""
    return sum(batch.codes.shape[0] * batch.codes.shape[1] for batch in loop.batches)
