"""From raw logs to dataset artifacts: the one entry point of data preparation.

Builds the ordered log (or finds it in the store), then cuts every stage of the split out of it,
shard by shard in Ray Data workers. Ray must be running.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from forge_ray.artifacts import (
    MANIFEST,
    Artifact,
    ArtifactInfo,
    ArtifactStore,
    ArtifactWriter,
    open_filesystem,
)
from forge_ray.config import to_mapping, to_overrides, to_yaml
from forge_ray.data.chain import TOGETHER
from forge_ray.data.cut import Stage, write_dataset
from forge_ray.data.importers import list_files
from forge_ray.data.log import build_log, find_log
from forge_ray.data.pairs import PairsConfig
from forge_ray.data.published import published_stages, sequence_shards
from forge_ray.data.schema import KIND, Dataset
from forge_ray.data.sequences import SEQUENCE_FILES
from forge_ray.data.sources import SourcesConfig, absolute, resolve
from forge_ray.data.splits import (
    LeaveOneOutConfig,
    PublishedConfig,
    SplitConfig,
    StageDays,
    TemporalConfig,
    stage_days,
)
from forge_ray.errors import ConfigError


@dataclass(kw_only=True)
class PrepareConfig(SourcesConfig):
    """A dataset: its sources, its split, its pairs."""

    name: str = ""
    """Name of the artifact; by default that of the source folder, or of the file of interactions
    without its ending."""
    split: SplitConfig = field(default_factory=LeaveOneOutConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    num_shards: int = 0
    """Shards of the log and of every split; 0: one per 32 MiB of raw interactions, at least 8."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.num_shards < 0:
            raise ConfigError(
                f"num_shards must be >= 0, got {self.num_shards}. Use 0 to derive it."
            )


def prepare(config: PrepareConfig, store: ArtifactStore) -> list[Dataset]:
    """Prepare every stage of a dataset; what the store has is not computed again.

    Args:
        config: sources, split and pairs.
        store: where the artifacts go.

    Returns:
        One dataset for `leave_one_out`, one per stage otherwise; all share the item index.

    Raises:
        ConfigError: the split does not go with the layout of the interactions.
        DataError: the input breaks a rule; names file, row or column.
    """
    located = absolute(config)
    resolved = resolve(located)
    assert isinstance(resolved, PrepareConfig)
    _check_split(resolved)
    name = config.name or _default_name(resolved)
    # Not the resolved paths: a folder in their place says the same in fewer words.
    command = shlex.join(["forge-ray", "data", "prepare", *to_overrides(located)])
    log = build_log(
        _sources(resolved), store, name=name, num_shards=config.num_shards, command=command
    )
    stages = _stages(config.split, log)
    together = [_key(resolved, stage, log) for stage in stages]
    return [
        _build(resolved, store, log, stage, name=name, command=command, together=together)
        for stage in stages
    ]


def open_or_prepare(path_or_ref: str | Path, store: ArtifactStore) -> Dataset:
    """Open a prepared dataset, or prepare a folder of raw files with conventional names.

    Args:
        path_or_ref: an artifact directory, `dataset/name-key12`, a key prefix, or a folder with
            `interactions.*`, optionally `items.*` and `*.npz` vectors, which is prepared with
            `leave_one_out` and default settings.
        store: where prepared datasets are looked up and put.

    Raises:
        ArtifactError: the reference is unknown.
        DataError: the folder's files break a rule.
    """
    text = str(path_or_ref)
    if not _is_raw_folder(text):
        return Dataset.open(store, text)
    return prepare(PrepareConfig(source=text), store)[0]


def find_prepared(path_or_ref: str | Path, store: ArtifactStore) -> Dataset | None:
    """What `open_or_prepare` would open, or None where it would prepare; needs no Ray.

    Raises:
        ArtifactError: the reference is unknown.
        DataError: the folder's files break a rule that shows without reading them.
    """
    text = str(path_or_ref)
    if not _is_raw_folder(text):
        return Dataset.open(store, text)
    resolved = resolve(absolute(PrepareConfig(source=text)))
    assert isinstance(resolved, PrepareConfig)
    log = find_log(_sources(resolved), store, num_shards=resolved.num_shards)
    if log is None:
        return None
    found = store.find(KIND, _key(resolved, _stages(resolved.split, log)[0], log))
    return None if found is None else Dataset(found)


def _is_raw_folder(text: str) -> bool:
    if "://" not in text and not Path(text).is_dir():
        return False
    filesystem, path = open_filesystem(text)
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        return False
    return filesystem.get_file_info(f"{path}/{MANIFEST}").type == pafs.FileType.NotFound


def _default_name(config: PrepareConfig) -> str:
    filesystem, path = open_filesystem(config.source or config.interactions.path)
    is_folder = filesystem.get_file_info(path).type == pafs.FileType.Directory
    return Path(path).name if is_folder else Path(path).stem


def _sources(config: PrepareConfig) -> SourcesConfig:
    return SourcesConfig(
        source=config.source,
        interactions=config.interactions,
        items=config.items,
        vectors=config.vectors,
        skip=config.skip,
    )


def _check_split(config: PrepareConfig) -> None:
    """Refuse what cannot be split so, before the log is built."""
    layout, kind = config.interactions.layout, config.split.kind
    if isinstance(config.split, PublishedConfig) and layout != "sequences":
        raise ConfigError(
            "split.kind=published must go with interactions.layout=sequences, got "
            f"{layout}. Split a log of events with temporal or leave_one_out."
        )
    if isinstance(config.split, PublishedConfig):
        path = config.interactions.path
        found = sequence_shards(path, list_files(path, field="interactions.path"))
        published_stages(config.split, found.names)
    if isinstance(config.split, TemporalConfig) and layout == "sequences":
        raise ConfigError(
            f"split.kind must be published or leave_one_out for sequences, got {kind}: they have "
            "no times. Set split.kind=published for the stages of the files."
        )


def _stages(split: SplitConfig, log: Artifact) -> list[Stage]:
    metrics = log.manifest.metrics
    if isinstance(split, PublishedConfig):
        found = published_stages(split, metrics[SEQUENCE_FILES])
        return [Stage(one.number, files=one) for one in found]
    if not isinstance(split, TemporalConfig):
        return [Stage(1)]
    days = stage_days(
        split,
        first_timestamp=metrics["first_timestamp"],
        last_timestamp=metrics["last_timestamp"],
        ticks_per_day=metrics["ticks_per_day"],
    )
    return [Stage(number, one) for number, one in enumerate(days, start=1)]


def _stage_name(name: str, stage: Stage) -> str:
    return f"{name}-s{stage.number}" if stage.days or stage.files else name


def _build(
    config: PrepareConfig,
    store: ArtifactStore,
    log: Artifact,
    stage: Stage,
    *,
    name: str,
    command: str,
    together: list[str],
) -> Dataset:
    artifact = store.build(
        KIND,
        _stage_name(name, stage),
        _identity(config, stage),
        parents=[log.key],
        produce=lambda writer: _produce(config, log, stage, writer, together=together),
        command=command,
        schema_version=_SCHEMA_VERSION,
    )
    return Dataset(artifact)


_SCHEMA_VERSION = 2
"""2: users shuffled inside shards."""


def _key(config: PrepareConfig, stage: Stage, log: Artifact) -> str:
    return ArtifactStore.key(KIND, _identity(config, stage), [log.key], _SCHEMA_VERSION)


def _identity(config: PrepareConfig, stage: Stage) -> dict[str, Any]:
    split, span = to_mapping(config.split), None
    if stage.days is not None:
        # The days say it all; another number of stages must not rebuild this one.
        kept = {"kind": split["kind"], "validation_share": split["validation_share"]}
        split = kept if split["targets"] == "all" else {**kept, "targets": split["targets"]}
        span = to_mapping(stage.days)
    if stage.files is not None:
        # Files have no days: the stage's number counts in their stead.
        days = StageDays(stage.number, stage.number + 1, stage.number + 2)
        span = {**to_mapping(days), "files": to_mapping(stage.files)}
    return {"split": split, "stage": span, "pairs": to_mapping(config.pairs)}


def _produce(
    config: PrepareConfig,
    log: Artifact,
    stage: Stage,
    writer: ArtifactWriter,
    *,
    together: list[str],
) -> ArtifactInfo:
    # The key leaves out where the raw files lie; this copy of the configuration has it.
    with writer.open("prepare.yaml") as stream:
        stream.write(to_yaml(config).encode())
    info = write_dataset(config.split, config.pairs, log=log, stage=stage, writer=writer)
    if stage.days is None and stage.files is None:
        return info
    return replace(info, metrics={**info.metrics, TOGETHER: together})
