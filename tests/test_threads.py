"""Thread counts follow the CPUs a process was given."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import os, faiss, torch
from forge_ray.threads import set_threads
set_threads({num_cpus})
print(torch.get_num_threads(), faiss.omp_get_max_threads(), os.environ["OMP_NUM_THREADS"])
"""


# In a process of its own: thread counts are global, and other tests rely on theirs.
@pytest.mark.parametrize(("num_cpus", "threads"), [(0.25, 1), (1, 1), (2.9, 2), (3, 3)])
def test_threads_are_the_whole_cpus_given(num_cpus: float, threads: int) -> None:
    code = PROBE.format(num_cpus=num_cpus)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(threads)] * 3
