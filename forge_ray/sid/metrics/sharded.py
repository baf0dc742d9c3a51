"""Work on gallery shards as Ray tasks, with bounded memory.

The only module of `sid.metrics` that knows Ray. Results come in the order in which they are ready,
and no more tasks are under way than the cluster has CPUs, so that neither shards nor results pile
up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from forge_ray.placement import label_selector
from forge_ray.threads import set_threads


def shard_tasks(is_sharded: bool) -> Callable[..., Iterator[Any]]:
    """How to run work on shards: as Ray tasks when there are several and a Ray is up, else `map`.

    Args:
        is_sharded: whether there is more than one shard.
    """
    import ray

    return run_on_ray if is_sharded and ray.is_initialized() else map


def run_on_ray(function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
    """Call a picklable function on each argument, one CPU each; yields results in any order.

    Args:
        function: sent to the object store once, whatever arrays it carries.
        arguments: small ones; one task each.
    """
    import ray

    shared = ray.put(function)
    # SPREAD keeps the tasks out of the placement group of a trial that calls this: there they would
    # wait for ever for the CPU that the trial holds.
    task = ray.remote(_call).options(
        num_cpus=1,
        scheduling_strategy="SPREAD",
        label_selector=label_selector(),
        max_retries=2,
    )
    limit = max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: list[Any] = []
    for argument in arguments:
        if len(pending) >= limit:
            ready, pending = ray.wait(pending, num_returns=1)
            yield ray.get(ready[0])
        pending.append(task.remote(shared, argument))
    while pending:
        ready, pending = ray.wait(pending, num_returns=1)
        yield ray.get(ready[0])


def _call(function: Callable[[Any], Any], argument: Any) -> Any:
    set_threads(1)
    return function(argument)
