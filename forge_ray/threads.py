"""Thread counts of a process, set once from the CPUs it was given.

Two processes that each run as many OpenMP threads as the machine has cores slow each other down by
an order of magnitude (spinning barriers), so every worker calls `set_threads` before any work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def set_threads(num_cpus: float) -> int:
    """Limits torch, OpenMP and faiss in this process to the CPUs it was given.

    Args:
        num_cpus: CPUs assigned to the process; a fraction counts as one thread.

    Returns:
        The number of threads set, `max(1, floor(num_cpus))`.
    """
    # Imported here: a process that only sets threads (a Ray task on arrays) should stay light.
    import faiss
    import torch

    threads = max(1, int(num_cpus))
    # Libraries that read the environment lazily (a later fork, a subprocess) follow it too.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    return threads


def threads_given() -> int:
    """Threads this process may use: those of `set_threads`, else the machine's CPUs."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def map_threads(
    function: Callable[[Argument], Result], arguments: Iterable[Argument]
) -> list[Result]:
    """Calls a function that spends its time in NumPy, which lets other threads run meanwhile.

    Args:
        function: must not write where another call reads or writes.
        arguments: one for each call.

    Returns:
        The results in the order of the arguments.
    """
    calls = list(arguments)
    threads = min(threads_given(), len(calls))
    if threads <= 1:
        return [function(argument) for argument in calls]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, calls))
