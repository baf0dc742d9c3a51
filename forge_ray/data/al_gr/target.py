"""The folder that an export writes to: whose it is, and which files are complete.

A file is written as `NAME.partial` and renamed when complete, so a file that is there is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyarrow import fs as pafs

from forge_ray.artifacts import open_filesystem
from forge_ray.errors import DataError

_CLAIM = "_export.json"


@dataclass(frozen=True, slots=True)
class Target:
    """Where files go."""

    filesystem: Any
    root: str

    @classmethod
    def at(cls, uri: str) -> Target:
        """The folder at a path or URI, whether it exists or not."""
        return cls(*open_filesystem(uri))

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Write down what the files are made from, or check it, before any is taken for ours.

        Args:
            identity: JSON values by name; those written before must be among them.

        Raises:
            DataError: the folder holds something else.
        """
        entries = self.filesystem.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        if any(one.base_name == _CLAIM for one in entries):
            with self.filesystem.open_input_file(f"{self.root}/{_CLAIM}") as stream:
                theirs = json.loads(stream.read())
            other = [name for name, one in theirs.items() if identity.get(name) != one]
            if other:
                raise DataError(
                    f"output must hold files of this export only, got one that differs in "
                    f"{other[0]!r} in {self.root}. Choose another folder."
                )
        elif entries:
            raise DataError(
                f"output must be a new or empty folder, or one that this export began, got "
                f"{self.root} with {len(entries)} entries. Choose another folder."
            )
        self.filesystem.create_dir(self.root, recursive=True)
        with self.filesystem.open_output_stream(f"{self.root}/{_CLAIM}") as stream:
            stream.write(json.dumps(dict(identity), indent=1, ensure_ascii=False).encode())

    def path(self, name: str) -> str:
        """Where a file goes; its folder exists afterwards."""
        path = f"{self.root}/{name}"
        self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        return path

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        found = self.filesystem.get_file_info(f"{self.root}/{name}")
        return None if found.type == pafs.FileType.NotFound else int(found.size)
