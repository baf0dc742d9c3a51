"""Which datasets are the stages of one temporal or published split, in order.

Knows manifests only: stages share a log, a split and the length of their days, and each begins
where the one before ends.
"""

from __future__ import annotations

from typing import Any

from forge_ray.artifacts import ArtifactStore, Manifest
from forge_ray.data.schema import KIND, Dataset
from forge_ray.errors import ConfigError


def stage_chain(store: ArtifactStore, ref: str) -> list[Dataset]:
    """The stages that a dataset belongs to, oldest first.

    Args:
        store: holds them.
        ref: any one of them.

    Raises:
        ConfigError: the dataset is no stage, or the only one.
    """
    chosen = Dataset.open(store, ref).artifact.manifest
    if chosen.config.get("stage") is None:
        raise ConfigError(
            f"{chosen.ref} must be a stage of a temporal or published split, got a "
            f"{chosen.config['split']['kind']} split. Prepare a log with split.kind=temporal, "
            "FORGE's files with split.kind=published."
        )
    others = [one for one in store.manifests(KIND) if _is_sibling(one, chosen)]
    by_first = {one.config["stage"]["first"]: one for one in others}
    chain = [chosen]
    by_end = {one.config["stage"]["end"]: one for one in others}
    while (before := by_end.get(chain[0].config["stage"]["first"])) is not None:
        chain.insert(0, before)
    while (after := by_first.get(chain[-1].config["stage"]["end"])) is not None:
        chain.append(after)
    if len(chain) < 2:
        raise ConfigError(
            f"{chosen.ref} must be one of several stages, got none before or after it of its log "
            f"in {store.uri}. Prepare a log with split.num_stages=3, FORGE's files with the next "
            "stage's among them."
        )
    return [Dataset.open(store, one.key) for one in chain]


def _is_sibling(one: Manifest, other: Manifest) -> bool:
    return (
        one.config.get("stage") is not None
        and one.parents == other.parents
        and _shape(one) == _shape(other)
        and one.key != other.key
    )


def _shape(manifest: Manifest) -> dict[str, Any]:
    """What all stages of one split have in common."""
    stage = manifest.config["stage"]
    rest = {name: value for name, value in manifest.config.items() if name != "stage"}
    return {
        **rest,
        "train_days": stage["end"] - stage["first"],
        "test_days": stage["held_out_end"] - stage["end"],
    }
