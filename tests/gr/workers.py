"""A process group of one worker; under Ray the trainer makes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def as_one_worker() -> Iterator[None]:
    """What a trainer sets for its only worker, with one thread, for the length of a block."""
    previous = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if previous is None:
        del os.environ["LOCAL_RANK"]
