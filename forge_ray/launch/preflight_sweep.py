"""What a sweep asks of a cluster, beside what the cluster is."""

from __future__ import annotations

from pathlib import Path

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import from_mapping, to_mapping
from forge_ray.data.prepare import find_prepared
from forge_ray.errors import ConfigError
from forge_ray.launch.preflight_checks import Finding
from forge_ray.sid.metrics.config import ScoreConfig
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.demands import measure_room, trial_demands
from forge_ray.sweep.resolve import trial_config
from forge_ray.sweep.sweep import raw_folder, sweep_folder

_COMPILE = "gr.engine.compile"


def compiles(config: SweepConfig) -> bool:
    """Whether some trial compiles its blocks."""
    return bool(trial_config(config, {}).gr.engine.compile) or _COMPILE in config.space


def shared_places(store: ArtifactStore, config: SweepConfig | None) -> list[str]:
    """What all nodes must see: the store and, unless it lies there, the sweep's folder."""
    if config is None:
        return [store.uri]
    folder = str(sweep_folder(config, store).resolve())
    return [store.uri] if folder.startswith(f"{store.uri}/") else [store.uri, folder]


def check_resources(config: SweepConfig, store: ArtifactStore) -> Finding:
    """Whether the cluster, with what its autoscaler may add, holds one trial of a sweep.

    The sweep's common settings are looked at; `sweep run` looks at every design before it starts.
    """
    asked = to_mapping(trial_config(config, {}))
    score = from_mapping(ScoreConfig, dict(config.score))
    demands = trial_demands(asked, config.resources, score, num_items=_num_items(config, store))
    try:
        room = measure_room(
            [demands],
            config.resources.autoscaled,
            max_concurrent=config.max_concurrent,
            limit=config.num_trials or 1,
        )
    except ConfigError as error:
        return Finding(check="resources", verdict="failed", text=str(error))
    return Finding(check="resources", verdict="ok", text=f"{room.trials} trials at a time")


def _num_items(config: SweepConfig, store: ArtifactStore) -> int:
    raw = config.data or raw_folder(sweep_folder(config, store))
    if not config.data and not Path(raw).exists():
        return 0  # nothing is known yet
    dataset = find_prepared(raw, store)
    return dataset.num_items if dataset else 0
