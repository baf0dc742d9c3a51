"""What the stages of a trial hold on the cluster, from their configuration, and what there is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private import label_utils, state

from forge_ray.config import from_mapping
from forge_ray.errors import ConfigError
from forge_ray.gr.config import GrConfig
from forge_ray.sid.config import SidConfig
from forge_ray.sid.metrics.config import ScoreConfig
from forge_ray.sweep.capacity import Bundle, Demand, Nodes, at_once, check_fits, distinct
from forge_ray.sweep.config import AutoscaledNodes, ResourceConfig

_NODE_GROUP = "ray.io/node-group"
_GIB = 1024**3
_MIB = 1024**2
Demands = tuple[Demand, ...]


def trial_demands(
    config: Mapping[str, Any], asked: ResourceConfig, score: ScoreConfig, *, num_items: int
) -> Demands:
    """What a trial holds, stage by stage.

    Args:
        config: Of the trial.
        asked: What its stages ask for beside that.
        score: How designs are scored.
        num_items: Of the catalogue; decides what is spread.
    """
    gr, sid = from_mapping(GrConfig, config["gr"]), from_mapping(SidConfig, config["sid"])
    driver = Bundle(
        resources={"memory": asked.trial_memory_mb * _MIB}, labels=dict(asked.driver_labels)
    )
    evaluation = _stage_bundle(asked, asked.evaluate_cpus, asked.evaluate_gpus)
    return (
        _fit_demand(sid, asked, score, driver=driver, num_items=num_items),
        Demand(stage="train", held=(driver, *_training_bundles(gr))),
        Demand(stage="evaluate", held=(driver, evaluation)),
    )


def placing_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a trial's configuration that `trial_demands` reads."""
    gr = {
        name: value
        for name, value in config["gr"].items()
        if name == "data" or not isinstance(value, Mapping) or name.startswith("worker_")
    }
    return {"gr": gr, "sid": {name: config["sid"].get(name) for name in ("train", "encode")}}


def _fit_demand(
    sid: SidConfig,
    asked: ResourceConfig,
    score: ScoreConfig,
    *,
    driver: Bundle,
    num_items: int,
) -> Demand:
    held = [driver, _stage_bundle(asked, asked.sid_cpus, asked.sid_gpus)]
    spread = sid.train
    if spread.workers:
        worker = _stage_bundle(asked, spread.cpus_per_worker, spread.gpus_per_worker)
        held.append(dataclasses.replace(worker, num=spread.workers))
        held += _reading(spread.read_cpus, spread.workers * spread.read_tasks)
    cpus, gpus = 0.0, 0.0
    if num_items > sid.encode.local_items:
        cpus, gpus = sid.encode.cpus_per_actor, sid.encode.gpus_per_actor
    if min(num_items, score.hitrate_gallery) > score.hitrate_shard:
        cpus = max(cpus, 1.0)
    shared = (_stage_bundle(asked, cpus, gpus),) if cpus or gpus else ()
    return Demand(stage="fit", held=tuple(held), shared=shared)


def _training_bundles(gr: GrConfig) -> list[Bundle]:
    worker = {"CPU": gr.cpus_per_worker, "GPU": float(gr.use_gpu), **gr.worker_resources}
    workers = Bundle(resources=worker, labels=dict(gr.worker_labels), num=gr.num_workers)
    return [workers, *_reading(gr.data.read_cpus, gr.num_workers * gr.data.read_tasks)]


def _reading(cpus: float, num: int) -> list[Bundle]:
    return [Bundle(resources={"CPU": cpus}, num=num)] if cpus else []


def _stage_bundle(asked: ResourceConfig, cpus: float, gpus: float) -> Bundle:
    return Bundle(resources={"CPU": cpus, "GPU": gpus}, labels=dict(asked.stage_labels))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """What runs beside each other.

    Attributes:
        trials: Trials at a time.
        scoring: Designs that are scored at a time, before any trains.
    """

    trials: int
    scoring: int


def measure_room(
    demands: Iterable[Demands],
    autoscaled: Mapping[str, AutoscaledNodes],
    *,
    max_concurrent: int | None,
    limit: int,
) -> Room:
    """How many trials the cluster holds now and after the autoscaler did what it may; Ray is up.

    Args:
        demands: Of all kinds of trials.
        autoscaled: What the autoscaler may add.
        max_concurrent: Most trials wanted; None fills what others leave free at this moment.
        limit: Trials that there are.

    Raises:
        ConfigError: One trial never fits, or a label selector is none.
    """
    kinds = distinct(demands)
    whole = cluster_nodes(autoscaled)
    for kind in kinds:
        _check_selectors(kind)
        check_fits(kind, whole)
    wanted = limit if max_concurrent is None else min(max_concurrent, limit)
    nodes = cluster_nodes(autoscaled, is_free=True) if max_concurrent is None else whole

    def most(stages: Sequence[Sequence[Demand]]) -> int:
        return min((at_once(one, nodes, limit=wanted) for one in stages), default=wanted)

    return Room(trials=most(kinds), scoring=most([one[:1] for one in kinds]))


def _check_selectors(demands: Demands) -> None:
    for bundle in (bundle for one in demands for bundle in (*one.held, *one.shared)):
        # Private name: a test pins it. Ray itself would say so hours later, in a trial.
        error = label_utils.validate_label_selector(dict(bundle.labels))
        if error:
            raise ConfigError(
                "gr.worker_labels, resources.driver_labels and resources.stage_labels must be "
                f"selectors of node labels, got {dict(bundle.labels)}. {error}"
            )


def cluster_nodes(
    autoscaled: Mapping[str, AutoscaledNodes], *, is_free: bool = False
) -> list[Nodes]:
    """The nodes that run, and those that the autoscaler may add to them.

    Args:
        autoscaled: What it may add.
        is_free: Whether only what nobody holds counts of those that run.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    # Private name: a test pins it. The public sum over the cluster hides which node is full.
    free = state.available_resources_per_node() if is_free else {}
    running = [
        Nodes(
            resources=_named(free.get(node["NodeID"], {}) if is_free else node["Resources"]),
            labels=node["Labels"],
        )
        for node in alive
    ]
    groups = Counter(node["Labels"].get(_NODE_GROUP) for node in alive)
    added = [
        Nodes(
            resources=_resources(one),
            labels={_NODE_GROUP: name, **one.labels},
            num=one.max_nodes - groups[name],
            is_up=False,
        )
        for name, one in autoscaled.items()
        if one.max_nodes > groups[name]
    ]
    return [*running, *added]


def _named(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if not name.startswith("node:")}


def _resources(node: AutoscaledNodes) -> dict[str, float]:
    plain = {"CPU": node.cpus, "GPU": node.gpus, "memory": node.memory_gb * _GIB}
    return {name: amount for name, amount in {**plain, **node.resources}.items() if amount}
