"""Thread counts of a process, set once from the CPUs it was given.

Two processes that each run as many OpenMP threads as the machine has cores slow each other down by
an order of magnitude (spinning barriers), so every worker calls `set_threads` before any work.
"""

from __future__ import annotations

import os


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
