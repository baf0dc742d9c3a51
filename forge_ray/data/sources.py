"""Where the raw files are and what their columns are called: configuration and conventional names.

A folder follows the conventions when it holds `interactions.{csv,tsv,jsonl,parquet}` (or a folder
`interactions/` of shards), optionally `items.*` (or `items/`), and vectors as `*.npz` or
`vectors.{parquet,jsonl}` beside them, or as shards in `vectors/` or `vectors/<space>/`. So does an
import of AL-GR files with `sequences/`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from pyarrow import fs as pafs

from forge_ray.artifacts import open_filesystem
from forge_ray.data.al_gr.folder import AL_GR_MANIFEST, AlGrFolder, numbered_spaces
from forge_ray.data.checks import TimeUnit, check_skip
from forge_ray.data.importers import FORMATS
from forge_ray.data.schema import DEFAULT_SPACE
from forge_ray.data.sequences import EVENTS
from forge_ray.errors import ConfigError, DataError

S = TypeVar("S", bound="SourcesConfig")
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class InteractionsConfig:
    """The interaction log."""

    path: str = ""
    """File, or folder of shards; empty: the conventional name in `source`."""
    user_id: str = "user_id"
    """Name of the column with the user's id."""
    item_id: str = "item_id"
    """Name of the column with the item's id."""
    timestamp: str = "timestamp"
    """Name of the column with the time."""
    timestamp_unit: TimeUnit = "s"
    """Unit of whole-number times; date-time columns are converted to it."""
    layout: Literal["events", "sequences"] = "events"
    """Whether a row is one interaction, or a sequence: Parquet with lists of item ids, oldest
    first, in columns `history` and `targets`, as an AL-GR import has them. A sequence is taken as
    a user, and the place in it as the time."""
    unsorted: Literal["error", "sort"] = "error"
    """What to do when a user's rows are not in time order within the files, taken in name order."""


@dataclass(kw_only=True)
class ItemsConfig:
    """The catalogue; every column besides the id comes along."""

    path: str = ""
    """File or folder; empty: the conventional name in `source`, else the items that occur in the
    interactions."""
    item_id: str = "item_id"
    """Name of the column with the item's id."""
    required: list[str] = field(default_factory=list)
    """Columns in which every item must have a value, such as codes that it is to be known by."""


@dataclass(kw_only=True)
class VectorsConfig:
    """One vector space."""

    path: str = ""
    """File or folder: `.npz` with two arrays, or Parquet/JSONL with a column of lists."""
    item_id: str = "item_id"
    """Name of the column (or array) with the item's id."""
    vector: str = "embedding"
    """Name of the column (or array) with the vector."""


@dataclass(kw_only=True)
class SourcesConfig:
    """All raw inputs of a dataset, and what happens to bad rows."""

    source: str = ""
    """Folder with conventional names; used for every path that is empty."""
    interactions: InteractionsConfig = field(default_factory=InteractionsConfig)
    items: ItemsConfig = field(default_factory=ItemsConfig)
    vectors: dict[str, VectorsConfig] = field(default_factory=dict)
    """Vector spaces by name; `default` is what stages use unless told otherwise."""
    skip: list[str] = field(default_factory=list)
    """Bad rows to leave out and count instead of failing, by cause (`checks.SKIPPABLE`)."""

    def __post_init__(self) -> None:
        """Check the skip list."""
        check_skip(self.skip)


def absolute(config: S) -> S:
    """Spell local paths in full, so that the configuration works from any directory."""
    return replace(
        config,
        source=absolute_path(config.source),
        interactions=replace(config.interactions, path=absolute_path(config.interactions.path)),
        items=replace(config.items, path=absolute_path(config.items.path)),
        vectors={
            space: replace(one, path=absolute_path(one.path))
            for space, one in config.vectors.items()
        },
    )


def absolute_path(path: str) -> str:
    """A local path in full; URIs and nothing stay as they are."""
    return path if not path or "://" in path else str(Path(path).resolve())


def resolve(config: SourcesConfig) -> SourcesConfig:
    """Fill empty paths from the folder `source`.

    Raises:
        ConfigError: neither `source` nor `interactions.path` is given.
        DataError: the folder holds no interactions, or several spaces and none is the default.
    """
    if not config.source and not config.interactions.path:
        raise ConfigError(
            "interactions.path must name a file or folder, got none. "
            "Set it, or set source to a folder with conventional names."
        )
    if not config.source:
        return config
    entries = _entries(config.source)
    interactions = replace(
        config.interactions, path=config.interactions.path or _find(entries, "interactions")
    )
    is_import = _has(entries, AL_GR_MANIFEST)
    if not interactions.path and is_import:
        interactions = _sequences_of(config, entries)
    if not interactions.path:
        raise DataError(
            f"{config.source} must hold interactions.csv, .jsonl, .parquet or a folder "
            f"interactions/, got {sorted(entries)}. Rename the file, or set interactions.path."
        )
    numbered = _numbered_spaces(config.source) if is_import and not config.vectors else []
    return replace(
        config,
        interactions=interactions,
        items=replace(config.items, path=config.items.path or _find(entries, "items")),
        vectors=config.vectors or _find_vectors(config.source, entries, numbered),
    )


def event_columns(config: SourcesConfig) -> dict[str, str]:
    """Return the mapping of the interaction columns, ours to theirs."""
    section = config.interactions
    if section.layout == "sequences":
        return {name: name for name in EVENTS.names}
    return {
        "user_id": section.user_id,
        "item_id": section.item_id,
        "timestamp": section.timestamp,
    }


def _sequences_of(config: SourcesConfig, entries: dict[str, pafs.FileInfo]) -> InteractionsConfig:
    """The sequences of an AL-GR import, which has no file of interactions."""
    path = _find(entries, "sequences")
    if not path:
        raise DataError(
            f"{config.source} must hold sequences/ to be prepared, got an AL-GR import of "
            f"{sorted(one.base_name for one in entries.values())}. Import FORGE's "
            "Origin-Sequence-Data as well: rows for training hold SIDs, not items."
        )
    return replace(config.interactions, path=path, layout="sequences")


def _numbered_spaces(folder: str) -> list[str]:
    """The vector spaces of an AL-GR import that have numbers of rows for ids."""
    _, records = AlGrFolder.at(folder).finished()
    numbered = numbered_spaces(records)
    if numbered:
        logger.warning(
            "left out vector spaces %s of %s: their .npz files have numbers of rows for ids, not "
            "items. Set vectors.NAME.path to take one all the same.",
            numbered,
            folder,
        )
    return numbered


def _has(entries: dict[str, pafs.FileInfo], name: str) -> bool:
    return any(one.base_name == name for one in entries.values())


def _entries(folder: str) -> dict[str, pafs.FileInfo]:
    filesystem, path = open_filesystem(folder)
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        raise DataError(f"source must be a folder, got {folder}. Check the path.")
    found = filesystem.get_file_info(pafs.FileSelector(path))
    base, mark, options = folder.partition("?")
    return {
        f"{base.rstrip('/')}/{one.base_name}{mark}{options}": one
        for one in found
        if not one.base_name.startswith((".", "_"))
    }


def _find(entries: dict[str, pafs.FileInfo], stem: str) -> str:
    matches = [
        uri
        for uri, one in entries.items()
        if (one.type == pafs.FileType.Directory and one.base_name == stem)
        or (one.type == pafs.FileType.File and _is_named(one.base_name, stem))
    ]
    if len(matches) > 1:
        raise DataError(
            f"source must hold one input named {stem}, got {sorted(matches)}. "
            f"Remove all but one, or set {stem}.path."
        )
    return matches[0] if matches else ""


def _is_named(name: str, stem: str) -> bool:
    head, _, suffix = name.rpartition(".")
    return head == stem and f".{suffix.lower()}" in FORMATS


def _find_vectors(
    folder: str, entries: dict[str, pafs.FileInfo], numbered: Sequence[str]
) -> dict[str, VectorsConfig]:
    """The vector spaces of a folder by name, less those of an import that number their rows."""
    files = {uri: one for uri, one in entries.items() if one.type == pafs.FileType.File}
    single = _find(files, "vectors")
    spaces = {
        one.base_name.rpartition(".")[0]: uri
        for uri, one in files.items()
        if uri == single or one.base_name.lower().endswith(".npz")
    }
    for uri, entry in entries.items():
        if entry.base_name == "vectors" and entry.type == pafs.FileType.Directory:
            inner = _entries(uri)
            folders = {e.base_name: u for u, e in inner.items() if e.type != pafs.FileType.File}
            kept = {name: u for name, u in folders.items() if name not in numbered}
            # Without folders it is a space itself.
            spaces |= kept if folders else {DEFAULT_SPACE: uri}
    if len(spaces) == 1:
        spaces = {DEFAULT_SPACE: next(iter(spaces.values()))}
    if spaces and DEFAULT_SPACE not in spaces:
        raise DataError(
            f"{folder} must hold one vector space or one named {DEFAULT_SPACE}, got "
            f"{sorted(spaces)}. Rename one, or list them under `vectors` in a configuration."
        )
    return {name: VectorsConfig(path=uri) for name, uri in sorted(spaces.items())}
