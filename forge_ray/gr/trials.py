"""Independent trainings as Ray Tune trials, each of which nests its Ray Train runs.

A trial gives back nothing: what it made lies in the artifact store, and whoever asks for it again
finds it there. So nothing needs Tune's own restore, and a session that was interrupted continues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ray import tune

from forge_ray.artifacts import open_filesystem
from forge_ray.errors import ForgeError, worker_error
from forge_ray.quiet_tune import quiet_tune
from forge_ray.threads import set_threads

_DRIVER_MEMORY = 1 << 30
"""Bytes of a trial's own process."""


def fill_store(
    jobs: Mapping[str, Callable[[], object]], *, parallel: int, cpus: float, folder: str
) -> None:
    """Runs every job as a trial; Ray must be running.

    Args:
        jobs: what to do, by name; found in the store when it was done before. All of them travel to
            every trial, pickled: Ray refuses more than 95 MiB, so they open what is large.
        parallel: trials at a time; what they train waits for its resources.
        cpus: of a trial's own process: 0 where it waits for workers of Ray Train.
        folder: of Tune's own files: a path or URI that nodes share.

    Raises:
        ForgeError: a job failed; the others came to their end.
    """
    filesystem, root = open_filesystem(folder)
    tuner = tune.Tuner(
        tune.with_resources(
            partial(_run, jobs=dict(jobs)),
            tune.PlacementGroupFactory([{"CPU": cpus, "memory": _DRIVER_MEMORY}]),
        ),
        param_space={"job": tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(max_concurrent_trials=parallel, reuse_actors=False),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=root,
            storage_filesystem=filesystem if "://" in folder else None,
            verbose=0,
        ),
    )
    with quiet_tune(filesystem, root):
        results = tuner.fit()
    for result in results:
        if result.error is None:
            continue
        cause = getattr(result.error, "cause", None)
        if isinstance(cause, ForgeError):
            raise cause from result.error
        name = result.config["job"]
        raise worker_error(
            result.error, f"trial {name!r} must come to its end", "The same command continues it."
        ) from result.error


def _run(config: Mapping[str, Any], *, jobs: Mapping[str, Callable[[], object]]) -> None:
    set_threads(1)
    jobs[config["job"]]()
    tune.report({"is_done": True})
