"""Which datasets are the stages of one temporal or published split, in order.

Knows manifests only. Stages that were prepared in one call name each other there (`TOGETHER`), so
another call on the same log changes no chain. Stages of a time before that are joined by what they
say of themselves: one log, one split, days that follow each other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from forge_ray.artifacts import ArtifactStore, Manifest
from forge_ray.data.schema import KIND, Dataset
from forge_ray.errors import ConfigError

logger = logging.getLogger(__name__)

TOGETHER = "stages"
"""Metric of a stage's manifest: keys of all stages prepared with it, itself too, oldest first. No
part of its key: a stage that two calls ask for is one dataset, and names those of the first."""


def stage_chain(store: ArtifactStore, ref: str) -> list[Dataset]:
    """The stages that a dataset was prepared with, oldest first.

    Args:
        store: holds them.
        ref: any one of them. A stage that several calls asked for stands for those of the first
            with more than one stage.

    Raises:
        ConfigError: the dataset is no stage, or the only one, or another is not in the store.
    """
    chosen = Dataset.open(store, ref).artifact.manifest
    if chosen.config.get("stage") is None:
        raise ConfigError(
            f"{chosen.ref} must be a stage of a temporal or published split, got a "
            f"{chosen.config['split']['kind']} split. Prepare a log with split.kind=temporal, "
            "FORGE's files with split.kind=published."
        )
    known = store.manifests(KIND)
    chain = [] if TOGETHER in chosen.metrics else _joined(chosen, known)
    if len(chain) > 1:
        names = ", ".join(one.ref for one in chain)
        logger.warning("%s does not name its stages; by their days these are %s", chosen.ref, names)
    else:
        chain = _named(chosen, known, store)
    if len(chain) < 2:
        raise ConfigError(
            f"{chosen.ref} must be one of several stages, got none that was prepared with it in "
            f"{store.uri}. Prepare a log with split.num_stages=3, FORGE's files with the next "
            "stage's among them."
        )
    return [Dataset.open(store, one.key) for one in chain]


def _named(chosen: Manifest, known: Sequence[Manifest], store: ArtifactStore) -> list[Manifest]:
    """The stages that the chosen one names, or that name it; none where it was prepared alone."""
    for one in (chosen, *known):
        keys = one.metrics.get(TOGETHER, ())
        if chosen.key not in keys or len(keys) < 2:
            continue
        by_key = {other.key: other for other in known}
        missing = [key[:12] for key in keys if key not in by_key]
        if missing:
            raise ConfigError(
                f"all {len(keys)} stages prepared with {chosen.ref} must be in {store.uri}, got "
                f"none of {', '.join(missing)}. Prepare them again: {one.command}"
            )
        return [by_key[key] for key in keys]
    return []


def _joined(chosen: Manifest, known: Sequence[Manifest]) -> list[Manifest]:
    """The stages around one that names none, of those that name none either."""
    others = [one for one in known if TOGETHER not in one.metrics and _is_sibling(one, chosen)]
    if chosen.config["split"]["kind"] == "published":
        # Numbers of published stages may leave some out: dates do at the end of a month.
        return sorted([*others, chosen], key=lambda one: one.config["stage"]["first"])
    chain = [chosen]
    by_first = {one.config["stage"]["first"]: one for one in others}
    by_end = {one.config["stage"]["end"]: one for one in others}
    while (before := by_end.get(chain[0].config["stage"]["first"])) is not None:
        chain.insert(0, before)
    while (after := by_first.get(chain[-1].config["stage"]["end"])) is not None:
        chain.append(after)
    return chain


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
