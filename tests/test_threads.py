"""Thread counts follow the CPUs a process was given."""

from __future__ import annotations

import subprocess
import sys

import pytest

from forge_ray.threads import map_threads

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


def test_calls_in_threads_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert map_threads(lambda number: number**2, range(20)) == [n**2 for n in range(20)]
        assert map_threads(str, []) == []
        with pytest.raises(ZeroDivisionError):
            map_threads(lambda number: 1 // number, [1, 0, 2])


ENTRY_POINTS = {
    "training": "forge_ray.gr.train:train_worker",
    "fitting": "forge_ray.sid.train:train_worker",
    "encoding": "forge_ray.sid.encode:_Encoder",
    "resolving": "forge_ray.sid.resolve:_place_partition",
    "scoring": "forge_ray.sid.metrics.sharded:_call",
    "embedding": "forge_ray.embed.encoders.stage:_EncodeSlice",
    "recommending": "forge_ray.gr.recommend:_PartWriter",
    "ranking": "forge_ray.evaluate.evaluator:_task",
    "tokenizing": "forge_ray.sweep.stages:fit_and_score",
    "evaluating": "forge_ray.sweep.stages:evaluate_model",
}


@pytest.mark.ray
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_worker_takes_the_threads_of_its_cpus(ray_local: None, name: str) -> None:
    """Even where the environment asks for more: each entry point is called with unusable inputs,
    which it may only notice after it has set its threads."""
    import ray

    # max_calls: a fresh process for each, since the setting outlives the call.
    @ray.remote(num_cpus=1, max_calls=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "2"}})
    def threads_around(
        entry: str, arguments: tuple[object, ...], keywords: dict[str, object]
    ) -> tuple[int, int]:
        import importlib

        import torch

        module, _, function = entry.partition(":")
        call = getattr(importlib.import_module(module), function)
        before = torch.get_num_threads()
        with pytest.raises(Exception):  # noqa: B017, PT011
            call(*arguments, **keywords)
        return before, torch.get_num_threads()

    class Config:
        cpus_per_worker = cpus_per_actor = 1.0
        use_gpu = False
        batch_rows = 1

    class Job:
        config = spread = Config()

    arguments: dict[str, tuple[object, ...]] = {
        "training": ({"job": Job()},),
        "fitting": ({"job": Job()},),
        "encoding": (None, None, Config(), None),
        "resolving": (None,),
        "scoring": (None, None),
        "embedding": (Config(), None, None, None),
        "recommending": (Job(),),
        "ranking": ([None], None, Config(), None),
        "tokenizing": ("/nonexistent", ""),
        "evaluating": ("/nonexistent", ""),
    }
    keywords: dict[str, dict[str, object]] = {
        "resolving": {"shared": None},
        "tokenizing": {"sid": {}, "score": {}, "cpus": 1.0},
        "evaluating": {"split": "validation", "users": 0, "evaluation": {}, "cpus": 1.0},
    }
    found = ray.get(
        threads_around.remote(ENTRY_POINTS[name], arguments[name], keywords.get(name, {}))
    )
    assert found == (2, 1)
