"""Training in the calling process: the loop of a Ray Train worker, less Ray Train.

For many short trainings of small models, where starting processes takes longer than training. The
losses and weights are those of one worker. Nobody restarts it; the same call continues from the
newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from forge_ray.errors import ConfigError
from forge_ray.gr.loop import LoopHooks, TrainJob, TrainLoop
from forge_ray.gr.validation import CheckpointValidator, InlineValidation


def train_here(
    job: TrainJob,
    codes: NDArray[np.unsignedinteger[Any]],
    *,
    report: Callable[[dict[str, Any]], None],
    poll: Callable[[], str],
    count: Callable[[Mapping[str, float]], None],
) -> None:
    """Runs a training to its end, whatever that is; the run's folder says which.

    Args:
        job: the run.
        codes: [num_items, L].
        report: told of each row of metrics.
        poll: asked whether to stop; see `LoopHooks`.
        count: told what to add to the counters.

    Raises:
        ConfigError: this process is one of several workers.
    """
    with _only_worker(int(job.config.cpus_per_worker)):
        hooks = LoopHooks(
            report=report,
            validation=InlineValidation(CheckpointValidator(job, codes, device="cpu")),
            poll=poll,
            is_preempted=lambda: False,
            count=count,
        )
        with contextlib.closing(TrainLoop(job, codes, hooks)) as loop:
            loop.restore()
            loop.run()


@contextmanager
def _only_worker(threads: int) -> Iterator[None]:
    """A process group of this process alone, and its threads, for the length of a block.

    The group stays: DeepSpeed keeps the first one that it sees and fails with a second.
    """
    if not distributed.is_initialized():
        store = distributed.HashStore()  # type: ignore[attr-defined]  # imported by a star
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if distributed.get_world_size() > 1:
        raise ConfigError(
            "in_process must be false inside a worker of another training, got true. Leave it out."
        )
    before, rank = torch.get_num_threads(), os.environ.get("LOCAL_RANK")
    torch.set_num_threads(max(1, threads))
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank
