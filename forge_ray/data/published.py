"""Which stage and part of a benchmark its published files belong to, told by their names.

FORGE publishes sequences as files per stage, for training and for test. Knows names and numbers
of files; which rows are of which file is marked in the log (`sequences`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from forge_ray.data.al_gr.folder import import_above, number_in
from forge_ray.data.importers import SEQUENCES, RawFile, sequence_prefix
from forge_ray.data.splits import PublishedConfig, PublishedStage
from forge_ray.errors import DataError


@dataclass(frozen=True, slots=True)
class SequenceShards:
    """Shards of sequences, and the files that they were imported from.

    Attributes:
        shards: to be read; `origin` is a place in `names`.
        names: the files' own names.
    """

    shards: tuple[RawFile, ...]
    names: tuple[str, ...]


def sequence_shards(path: str, files: Sequence[RawFile]) -> SequenceShards:
    """Mark each shard with the file that it is from: itself, unless an import says otherwise.

    Args:
        path: the folder of the shards.
        files: the shards.

    Raises:
        DataError: two files would have the same users, or the import was interrupted.
    """
    names = [file.uri.partition("?")[0].rpartition("/")[2] for file in files]
    above, numbers = import_above(path), [number_in(name) for name in names]
    folders = [file.uri.partition("?")[0].rpartition("/")[0] for file in files]
    if above is not None and all(folder.endswith("/sequences") for folder in folders):
        settings, _ = above.finished()
        names = [
            name if number is None else settings.files[number]
            for name, number in zip(names, numbers, strict=True)
        ]
    _require_distinct_users(files)
    known = {name: number for number, name in enumerate(sorted(set(names)))}
    shards = tuple(
        replace(file, format=SEQUENCES, origin=known[name])
        for file, name in zip(files, names, strict=True)
    )
    return SequenceShards(shards, tuple(known))


def _require_distinct_users(files: Sequence[RawFile]) -> None:
    by_prefix: dict[str, str] = {}
    for file in files:
        other = by_prefix.setdefault(sequence_prefix(file), file.uri)
        if other != file.uri:
            raise DataError(
                f"interactions.path must hold files whose names differ without `part-`, got "
                f"{other} and {file.uri}: their users would be the same. Rename one."
            )


def published_stages(config: PublishedConfig, names: Sequence[str]) -> list[PublishedStage]:
    """Sort the files into stages and parts.

    Args:
        config: how names tell.
        names: of all files, by number.

    Raises:
        DataError: a name tells no stage, or a stage has no file to train on or none to test on.
    """
    parts: dict[int, dict[str, list[int]]] = {}
    for number, name in enumerate(names):
        found = re.search(config.stage_pattern, name)
        if found is None or not (found[1] or "").isdecimal():
            raise DataError(
                f"split.stage_pattern must find the stage in the name of every file, got none in "
                f"{name!r} with {config.stage_pattern!r}. Set it to a regular expression whose "
                "first group is the stage's number, or import the stages' files alone."
            )
        stage = parts.setdefault(int(found[1]), {"train": [], "validation": [], "test": []})
        stage[_part_of(name, config)].append(number)
    for number, stage in sorted(parts.items()):
        for part in ("train", "test"):
            if not stage[part]:
                others = [names[one] for several in stage.values() for one in several]
                raise DataError(
                    f"stage {number} must have a file to {part} on, got {others}. Import that file "
                    f"too, or set split.test_pattern (now {config.test_pattern!r})."
                )
    return [
        PublishedStage(number, **{part: tuple(found) for part, found in parts[number].items()})
        for number in sorted(parts)
    ]


def _part_of(name: str, config: PublishedConfig) -> str:
    if re.search(config.test_pattern, name):
        return "test"
    return "validation" if re.search(config.validation_pattern, name) else "train"
