"""Which stage and part of a benchmark its published files belong to, told by their names.

FORGE publishes sequences as files per stage, for training and for test. Knows names and numbers
of files; which rows are of which file is marked in the log (`sequences`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from forge_ray.data.al_gr.folder import import_above, number_in
from forge_ray.data.importers import SEQUENCES, RawFile
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
    """
    names = [file.uri.partition("?")[0].rpartition("/")[2] for file in files]
    settings = import_above(path)
    if settings is not None:
        names = [settings.files[number_in(name)] for name in names]
    known = tuple(sorted(set(names)))
    shards = tuple(
        replace(file, format=SEQUENCES, origin=known.index(name))
        for file, name in zip(files, names, strict=True)
    )
    return SequenceShards(shards, known)


def published_stages(config: PublishedConfig, names: Sequence[str]) -> list[PublishedStage]:
    """Sort the files into stages and parts.

    Args:
        config: how names tell.
        names: of all files, by number.

    Raises:
        DataError: a name tells no stage, or a stage has no file to train on or none to test on.
    """
    parts: dict[int, tuple[list[int], list[int]]] = {}
    for number, name in enumerate(names):
        found = re.search(config.stage_pattern, name)
        if found is None:
            raise DataError(
                f"split.stage_pattern must find the stage in the name of every file, got none in "
                f"{name!r} with {config.stage_pattern!r}. Set it to a regular expression whose "
                "first group is the stage's number, or import the stages' files alone."
            )
        is_test = re.search(config.test_pattern, name) is not None
        parts.setdefault(int(found.group(1)), ([], []))[is_test].append(number)
    for stage, (train, test) in sorted(parts.items()):
        for part, here in (("train on", train), ("test on", test)):
            if not here:
                others = [names[number] for number in (*train, *test)]
                raise DataError(
                    f"stage {stage} must have a file to {part}, got {others}. Import that file "
                    f"too, or set split.test_pattern (now {config.test_pattern!r})."
                )
    return [PublishedStage(s, tuple(parts[s][0]), tuple(parts[s][1])) for s in sorted(parts)]
