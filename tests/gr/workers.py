"""A process group of one worker; under Ray the trainer makes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed


@contextmanager
def one_worker(folder: Path) -> Iterator[None]:
    """Makes this process the only worker, with one thread, for the length of a block."""
    previous = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    store = folder / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    distributed.destroy_process_group()
    if previous is None:
        del os.environ["LOCAL_RANK"]
